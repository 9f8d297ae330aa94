"""Steps and offsets of channels, and the statistics they are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.precision import CalibrationRecord

# Offsets lie on a grid of so many parts of a step, so that steps centre on the middle of a channel.
OFFSETS_PER_STEP: Final = 16
# Bits of float16's significand, the hidden one included, less one for values of up to two sigma.
_SIGNIFICANT_BITS: Final = 10
_FEWEST_BITS: Final = 3
# Of spacings of normal numbers: float16 has 13 bits less. Below these it is the same everywhere.
_FLOAT16_TO_FLOAT32: Final = 2.0**13
_LEAST_SPACING: Final = 2.0**-24
# Less than one in thousand of a step: what float32 may round away on the way.
_SLACK: Final = 1 - 2.0**-12


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStatistics:
    """What is usual in every channel of one layer.

    Attributes
    ----------
    center, sigma
        Mean and standard deviation without what is unusual: float32 ``(hidden,)``, in the units of
        the hidden states; sigma is greater than zero.
    """

    center: NDArray[np.float32]
    sigma: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScale:
    """How the channels of one layer are stored in steps.

    Attributes
    ----------
    step, offset
        Distance of neighbouring values, and the value of the middle one: float32 ``(hidden,)``.
        Offsets are whole sixteenths of a step.
    sigma
        What the bound is stated in: float32 ``(hidden,)``. It is larger than that of the
        statistics where steps would be finer than float16 itself.
    """

    step: NDArray[np.float32]
    offset: NDArray[np.float32]
    sigma: NDArray[np.float32]

    @property
    def statistics(self) -> ChannelStatistics:
        """What another scale can be made from."""
        return ChannelStatistics(self.offset, self.sigma)

    def equals(self, other: ChannelScale) -> bool:
        """Whether both give the same values."""
        return np.array_equal(self.step, other.step) and np.array_equal(self.offset, other.offset)


def channel_scale(statistics: ChannelStatistics, step: float) -> ChannelScale:
    """Steps of at most `step` sigma, of so few significant bits that float16 holds their multiples.

    A value that float16 has to round could leave the bound, and would have to be listed as an
    exception. With ``10 + floor(log2(step))`` bits all sums of an offset and some steps have up to
    11 within about two sigma: at 0.02 sigma one value in 5000 becomes an exception instead of one
    in 120, for steps that are 4 % finer on average.

    Parameters
    ----------
    statistics
        Of the layer's channels.
    step
        In sigma.
    """
    center = statistics.center.astype(np.float64)
    # Where float16 itself is coarser, its own spacing is the step, and nothing is lost.
    spacing = _float16_spacing(statistics.center)
    sigma = np.maximum(statistics.sigma, spacing / (step * _SLACK)).astype(np.float32)
    fine = _rounded_down(
        sigma.astype(np.float64) * (step * _SLACK), _SIGNIFICANT_BITS + math.floor(math.log2(step))
    )
    steps = np.maximum(fine, spacing)
    offsets = np.rint(center / steps * OFFSETS_PER_STEP) / OFFSETS_PER_STEP * steps
    return ChannelScale(steps.astype(np.float32), offsets.astype(np.float32), sigma)


def _float16_spacing(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The spacing of float16 at these values, as if it had more exponents."""
    spacing = np.spacing(np.abs(values)).astype(np.float64) * _FLOAT16_TO_FLOAT32
    return np.maximum(spacing, _LEAST_SPACING)


def _rounded_down(values: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """The largest numbers of so many significant bits that are not larger."""
    mantissa, exponent = np.frexp(values)
    scale = 2.0 ** max(_FEWEST_BITS, bits)
    return np.ldexp(np.floor(mantissa * scale) / scale, exponent)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What is usual in the channels of a model's layers.

    Attributes
    ----------
    layers
        By path of the layer, such as ``hidden_states/layer_005``.
    record
        What it was measured on.
    """

    layers: dict[str, ChannelStatistics] = field(default_factory=dict)
    record: CalibrationRecord | None = None

    @property
    def digest(self) -> str:
        """xxh3-128 over paths and values."""
        state = xxhash.xxh3_128()
        for path in sorted(self.layers):
            state.update(path.encode())
            for values in (self.layers[path].center, self.layers[path].sigma):
                state.update(np.ascontiguousarray(values, "<f4").tobytes())
        return state.hexdigest()

    def scales(self, step: float) -> ScaleSet:
        """The scales for steps of so many sigma."""
        scales = {path: channel_scale(each, step) for path, each in self.layers.items()}
        return ScaleSet(scales, self.record)


@dataclass(frozen=True, slots=True, eq=False)
class ScaleSet:
    """The scales of an archive.

    Attributes
    ----------
    layers
        By path of the layer, such as ``hidden_states/layer_005``.
    record
        What they were made from.
    """

    layers: dict[str, ChannelScale] = field(default_factory=dict)
    record: CalibrationRecord | None = None

    @property
    def calibration(self) -> Calibration:
        """What other scales can be made from."""
        return Calibration(
            {path: each.statistics for path, each in self.layers.items()}, self.record
        )

    def equals(self, other: ScaleSet) -> bool:
        """Whether both decode every layer alike."""
        return self.layers.keys() == other.layers.keys() and all(
            scale.equals(other.layers[path]) for path, scale in self.layers.items()
        )
