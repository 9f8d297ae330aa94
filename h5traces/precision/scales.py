"""Steps and offsets of channels, and the statistics they are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from h5traces.errors import PrecisionError
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray, cast_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from h5traces.format.precision import CalibrationRecord


# Names of the datasets of one layer: the fields of `ChannelStatistics` and `ChannelScale`.
CENTER: Final = "center"
STEP: Final = "step"
OFFSET: Final = "offset"
SIGMA: Final = "sigma"
NAMES: Final = frozenset({CENTER, STEP, OFFSET, SIGMA})

# Tokens that decide, by median and spread, what is unusual in the others.
_FIRST_TOKENS: Final = 256
_CHANNELS_AT_ONCE: Final = 256
# Sigmas of the median from which a value counts as unusual: massive activations lie at hundreds, a
# Gaussian has one value in 10^15 there.
_USUAL: Final = 8.0
# Median absolute deviation to standard deviation, of a Gaussian: 1 / Phi^-1(3/4).
_MAD_TO_SIGMA: Final = 1.4826022185056018
# A channel that hardly moves still gets steps of this share of what is usual in its layer.
_DEAD: Final = 2.0**-12

METHOD: Final = (
    "mean and standard deviation of each channel over all tokens but the first of a sample, "
    f"without values beyond {_USUAL:g} x 1.4826 MAD of the median of the first {_FIRST_TOKENS} "
    "tokens; sigma is at least 2^-12 of the layer's median sigma"
)

# Offsets lie on a grid of this many parts of a step, so that steps centre on a channel's middle.
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
    """Mean and standard deviation of every channel of one layer, without what is unusual.

    Both are float32 ``(hidden,)``, in the units of the hidden states; sigma is greater than zero.
    """

    center: NDArray[np.float32]
    sigma: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScale:
    """How the channels of one layer are stored in steps; all arrays are float32 ``(hidden,)``.

    `step` is the distance of neighbouring values, `offset` the value of the middle one, in whole
    sixteenths of a step. The bound is stated in `sigma`, which is larger than that of the
    statistics where steps would be finer than float16 itself.
    """

    step: NDArray[np.float32]
    offset: NDArray[np.float32]
    sigma: NDArray[np.float32]

    def equals(self, other: ChannelScale) -> bool:
        """Whether both give the same values."""
        return np.array_equal(self.step, other.step) and np.array_equal(self.offset, other.offset)


def channel_scale(statistics: ChannelStatistics, step: float) -> ChannelScale:
    """Steps of at most `step` sigma, of so few significant bits that float16 holds their multiples.

    A value that float16 has to round could leave the bound, and would have to be listed as an
    exception. With ``10 + floor(log2(step))`` bits all sums of an offset and some steps have up to
    11 within about two sigma: at 0.02 sigma one value in 5000 becomes an exception instead of one
    in 120, for steps that are 4 % finer on average.
    """
    center = statistics.center.astype(np.float64)
    # Where float16 itself, as if it had more exponents, is coarser, its spacing is the step, and
    # nothing is lost.
    spacing = np.spacing(np.abs(statistics.center)).astype(np.float64) * _FLOAT16_TO_FLOAT32
    spacing = np.maximum(spacing, _LEAST_SPACING)
    sigma = np.maximum(statistics.sigma, spacing / (step * _SLACK)).astype(np.float32)
    fine = _rounded_down(
        sigma.astype(np.float64) * (step * _SLACK), _SIGNIFICANT_BITS + math.floor(math.log2(step))
    )
    steps = np.maximum(fine, spacing)
    offsets = np.rint(center / steps * OFFSETS_PER_STEP) / OFFSETS_PER_STEP * steps
    return ChannelScale(steps.astype(np.float32), offsets.astype(np.float32), sigma)


def _rounded_down(values: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """The largest numbers of this many significant bits that are not larger."""
    mantissa, exponent = np.frexp(values)
    scale = 2.0 ** max(_FEWEST_BITS, bits)
    return np.ldexp(np.floor(mantissa * scale) / scale, exponent)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What is usual in the channels of layers, by path such as ``hidden_states/layer_005``."""

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
        """The scales for steps of this many sigma."""
        scales = {path: channel_scale(each, step) for path, each in self.layers.items()}
        return ScaleSet(scales, self.record)


@dataclass(frozen=True, slots=True, eq=False)
class ScaleSet:
    """The scales of an archive, by path such as ``hidden_states/layer_005``, and their source."""

    layers: dict[str, ChannelScale] = field(default_factory=dict)
    record: CalibrationRecord | None = None

    def equals(self, other: ScaleSet) -> bool:
        """Whether both decode every layer alike."""
        return self.layers.keys() == other.layers.keys() and all(
            scale.equals(other.layers[path]) for path, scale in self.layers.items()
        )


def stored_arrays(found: ScaleSet | Calibration) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every dataset of scales or statistics: path below the root, and values ``(hidden,)``."""
    for path, layer in found.layers.items():
        for each in fields(layer):
            values = np.ascontiguousarray(getattr(layer, each.name), "<f4")
            yield f"{layout.SCALES_GROUP}/{path}/{each.name}", values


class _Usual:
    """Moments of what lies near the median, by channel."""

    def __init__(self, first: NDArray[np.float32]) -> None:
        width = first.shape[1]
        self._median, self._limit = np.empty((2, width), np.float32)
        # Some channels at a time: medians take copies of all that they look at.
        for start in range(0, width, _CHANNELS_AT_ONCE):
            part = slice(start, start + _CHANNELS_AT_ONCE)
            self._median[part] = np.median(first[:, part], axis=0)
            with np.errstate(over="ignore"):
                away = np.abs(first[:, part] - self._median[part])
                spread = np.median(away, axis=0) * (_USUAL * _MAD_TO_SIGMA)
                self._limit[part] = np.minimum(spread, np.finfo(np.float32).max)
        self._moments = np.zeros((3, width))

    def add(self, rows: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore"):
            away = rows - self._median
        usual = np.abs(away) <= self._limit
        away[~usual] = 0
        self._moments[0] += np.count_nonzero(usual, axis=0)
        self._moments[1] += away.sum(axis=0, dtype=np.float64)
        self._moments[2] += np.square(away, dtype=np.float64).sum(axis=0)

    def statistics(self) -> ChannelStatistics:
        count, total, squares = self._moments
        # A channel may have no value that equals its median, and a spread of zero.
        count = np.maximum(count, 1)
        mean = total / count
        sigma = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
        sigma = np.maximum(sigma, _DEAD * (np.median(sigma) if sigma.size else 0))
        center = (self._median + mean).astype(np.float32)
        return ChannelStatistics(center, sigma.astype(np.float32))


class ChannelAccumulator:
    """Mean and standard deviation of the channels of one layer, without what is unusual.

    The first token of every longer sample is left out: in many models its activations are hundreds
    of times as large as all others and would decide alone. So are tokens with values that are not
    finite.

    Attributes
    ----------
    num_tokens, num_not_finite
        Tokens measured, and tokens left out because one of their values is not finite.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_not_finite = 0
        self._width: int | None = None
        self._first: list[NDArray[Any]] = []
        self._usual: _Usual | None = None

    def add(self, values: NDArray[Any]) -> None:
        """Measure the hidden states of one sample: floats ``(tokens, hidden)``.

        PrecisionError where they have another width than those before.
        """
        if self._width not in (None, values.shape[1]):
            message = (
                f"hidden states are {values.shape[1]} wide, those before {self._width}; expected "
                "samples of one model"
            )
            raise PrecisionError(message)
        self._width = values.shape[1]
        with np.errstate(over="ignore"):
            rows = (values[1:] if len(values) > 1 else values).astype(np.float32)
        finite = np.isfinite(rows).all(axis=1)
        self.num_not_finite += int(np.count_nonzero(~finite))
        rows = rows[finite]
        self.num_tokens += len(rows)
        if self._usual is not None:
            self._usual.add(rows)
            return
        # Half the memory, where float16 holds them.
        short = cast_values(TypedArray(rows, "float32"), "float16").values
        self._first.append(short if np.isfinite(short).all() else rows)
        if self.num_tokens >= _FIRST_TOKENS:
            self._usual = self._look()

    def _look(self) -> _Usual:
        """What is usual, from the tokens that were kept to find that out."""
        rows = np.concatenate(self._first, dtype=np.float32)
        self._first = []
        usual = _Usual(rows)
        usual.add(rows)
        return usual

    def statistics(self) -> ChannelStatistics:
        """Center and sigma of the tokens measured; PrecisionError without any."""
        if not self.num_tokens:
            message = (
                f"there are no tokens to measure; {self.num_not_finite} have values that are not "
                "finite"
            )
            raise PrecisionError(message)
        if self._usual is None:
            self._usual = self._look()
        return self._usual.statistics()
