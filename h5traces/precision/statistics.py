"""What is usual in every channel, from tokens as they stream by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import PrecisionError
from h5traces.format.dtypes import TypedArray, cast_values
from h5traces.precision.scales import ChannelStatistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens whose median and spread tell what is unusual in the others.
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
        Tokens taken in, and tokens left out since a value of theirs is not finite.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_not_finite = 0
        self._width: int | None = None
        self._first: list[NDArray[Any]] = []
        self._usual: _Usual | None = None

    def add(self, values: NDArray[Any]) -> None:
        """Take in the hidden states of one sample: floats ``(tokens, hidden)``.

        Raises
        ------
        PrecisionError
            They have another width than those before.
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
        """Center and sigma of what was taken in.

        Raises
        ------
        PrecisionError
            There was no token.
        """
        if not self.num_tokens:
            message = (
                f"there are no tokens to measure; {self.num_not_finite} have values that are not "
                "finite"
            )
            raise PrecisionError(message)
        if self._usual is None:
            self._usual = self._look()
        return self._usual.statistics()
