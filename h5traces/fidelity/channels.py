"""Errors in units of each channel's standard deviation, gathered in one pass.

Sums of squares and largest errors are kept by channel, so that they can be divided by the
deviations when those are known: no second pass is needed, and none of this is an approximation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A channel that hardly moves counts as if it moved by this share of what is usual in its layer; so
# do the scales of encodings.
DEAD: Final = 2.0**-12


class ChannelErrors:
    """Squared and largest errors of every channel, and the moments of A's values.

    Parameters
    ----------
    width
        Number of channels.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.num_values = 0
        self._squares = np.zeros(width)
        self._largest = np.zeros(width)
        # Moments are of distances from the first token, so that channels with a large mean and a
        # small spread lose no digits, and constant ones have a spread of exactly zero.
        self._origin: NDArray[Any] | None = None
        self._count = 0
        self._sums = np.zeros(width)
        self._sums_of_squares = np.zeros(width)

    def add_errors(self, errors: NDArray[Any], num_values: int) -> None:
        """Take in magnitudes of errors ``(tokens, width)``; `num_values` of them are compared."""
        self.num_values += num_values
        self._squares += np.einsum("ij,ij->j", errors, errors)
        np.maximum(self._largest, errors.max(axis=0, initial=0), out=self._largest)

    def add_reference(self, values: NDArray[Any]) -> None:
        """Take in values of A ``(tokens, width)`` that the deviation is of; all are finite."""
        if not len(values):
            return
        if self._origin is None:
            self._origin = values[0].copy()
        away = values - self._origin
        self._count += len(values)
        self._sums += away.sum(axis=0)
        self._sums_of_squares += np.einsum("ij,ij->j", away, away)

    def sigma(self) -> NDArray[np.float64] | None:
        """Standard deviation of every channel; None where no channel varies, or squares overflow.

        Channels below 2^-12 of the median of those that vary are given that.
        """
        if not self._count:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            mean = self._sums / self._count
            variance = self._sums_of_squares / self._count - np.square(mean)
        sigma: NDArray[np.float64] = np.sqrt(np.maximum(variance, 0))
        if not sigma.any() or not np.isfinite(sigma).all():
            return None
        floored: NDArray[np.float64] = np.maximum(sigma, DEAD * np.median(sigma[sigma > 0]))
        return floored

    def nrmse(self) -> float | None:
        """Root mean square of ``error / sigma`` over values; None without a sigma or a value."""
        sigma = self.sigma()
        if sigma is None or not self.num_values:
            return None
        return float(np.sqrt((self._squares / np.square(sigma)).sum() / self.num_values))

    def max_sigma(self) -> float | None:
        """The largest ``error / sigma``; None without a sigma or a value."""
        sigma = self.sigma()
        if sigma is None or not self.num_values:
            return None
        return float((self._largest / sigma).max())
