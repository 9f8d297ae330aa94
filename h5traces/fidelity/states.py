"""Measures of one layer's hidden states, and what all values are measured by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from h5traces.fidelity.reports import StateFidelity
from h5traces.format.dtypes import float16_to_float32
from h5traces.format.limits import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import DTypeLike, NDArray

# The smallest sigma of a channel, as a share of the median of its layer; as for scales.
DEAD: Final = 2.0**-12
# Cosines that differ by less are equal: float32 computes them no better, and no states stored as
# float16 differ by less.
TIE: Final = 1e-6
# Values at a time, so that intermediate results stay in the processor's cache, and tokens, so that
# float32 sums over them keep their digits.
_BLOCK: Final = 1 << 18
_MOST_TOKENS: Final = 256
# Cosines at a time.
_BLOCK_COSINES: Final = 1 << 22

_SPARE: Final = Scratch()


@dataclass(frozen=True, slots=True, eq=False)
class ValuePair:
    """Values of A and B, and B's minus A's: float32 or float64, of one shape.

    What is not finite in A or B is zero in all three; counts are as in `LayerFidelity`. They lie in
    one array, since threads wait for each other at every call of numpy.
    """

    values: NDArray[Any]
    # Of every row (of the last axis) of the three.
    squares: NDArray[Any]
    # Where A and B are finite; None if all are.
    finite: NDArray[np.bool_] | None = None
    num_not_finite: int = 0
    num_misplaced: int = 0

    @classmethod
    def of(cls, reference: NDArray[Any], restored: NDArray[Any], dtype: DTypeLike) -> Self:
        """The pair of two arrays of one shape, computed in `dtype`."""
        values = np.empty((3, *reference.shape), dtype)
        _widen(reference, values[0])
        _widen(restored, values[1])
        a, b, error = values
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(b, a, out=error)
            squares = row_squares(values)
        if np.isfinite(squares).all():
            return cls(values, squares)
        finite = np.isfinite(a) & np.isfinite(b)
        odd = ~finite
        same = (a[odd] == b[odd]) | (np.isnan(a[odd]) & np.isnan(b[odd]))
        counts = int(np.count_nonzero(~np.isfinite(a))), int(np.count_nonzero(~same))
        values[:, odd] = 0
        with np.errstate(over="ignore"):
            squares = row_squares(values)
        return cls(values, squares, finite, *counts)

    @property
    def reference(self) -> NDArray[Any]:
        """A's."""
        found: NDArray[Any] = self.values[0]
        return found

    @property
    def error(self) -> NDArray[Any]:
        """B's minus A's."""
        found: NDArray[Any] = self.values[2]
        return found

    def rows(self, rows: slice) -> ValuePair:
        """Some of the tokens, without counts."""
        finite = None if self.finite is None else self.finite[rows]
        return ValuePair(self.values[:, rows], self.squares[:, rows], finite)

    @property
    def num_finite(self) -> int:
        """Values that can be compared."""
        return self.error.size if self.finite is None else int(np.count_nonzero(self.finite))

    @property
    def finite_rows(self) -> NDArray[np.bool_]:
        """Rows (of the last axis) whose values are all finite."""
        if self.finite is None:
            return np.ones(self.error.shape[:-1], np.bool_)
        rows: NDArray[np.bool_] = np.logical_and.reduce(self.finite, axis=-1)
        return rows


@dataclass(slots=True)
class ValueErrors:
    """Measures of values of any meaning; named as in `LayerFidelity`."""

    num_values: int = 0
    num_not_finite: int = 0
    num_misplaced: int = 0
    max_error: float = 0.0
    max_relative: float = 0.0
    num_from_zero: int = 0
    num_to_zero: int = 0

    def add(
        self, pair: ValuePair, zeros: NDArray[np.bool_], max_error: float, max_relative: float
    ) -> None:
        """Add a pair: where A's and B's values are zero, and its largest error in both ways."""
        self.num_values += pair.num_finite
        self.num_not_finite += pair.num_not_finite
        self.num_misplaced += pair.num_misplaced
        self.max_error = max(self.max_error, max_error)
        self.max_relative = max(self.max_relative, max_relative)
        num_a, num_b, num_both = map(np.count_nonzero, (*zeros, zeros[0] & zeros[1]))
        self.num_from_zero += int(num_a - num_both)
        self.num_to_zero += int(num_b - num_both)


class ChannelErrors:
    """Squared and largest errors of every channel, and the moments of A's values."""

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
        """Add errors ``(tokens, width)``, of which `num_values` are compared."""
        self.num_values += num_values
        self._squares += np.einsum("ij,ij->j", errors, errors)

    def add_largest(self, errors: NDArray[Any]) -> float:
        """Add magnitudes of errors ``(tokens, width)``; returns the largest."""
        largest = errors.max(axis=0, initial=0)
        np.maximum(self._largest, largest, out=self._largest)
        return float(largest.max(initial=0))

    def add_reference(
        self, values: NDArray[Any], finite: NDArray[np.bool_] | None, first: int, *, keep: bool
    ) -> None:
        """Add the tokens of A from `first` on whose values are all finite, ``(tokens, width)``.

        `values` may be overwritten unless they are to `keep`.
        """
        values = values[first:] if finite is None else values[first:][finite[first:].all(axis=1)]
        if not len(values):
            return
        if self._origin is None:
            self._origin = values[0].copy()
        away = np.subtract(values, self._origin, out=_spare(values) if keep else values)
        self._count += len(values)
        self._sums += away.sum(axis=0)
        self._sums_of_squares += np.einsum("ij,ij->j", away, away)

    def _sigma(self) -> NDArray[np.float64] | None:
        """Standard deviation of every channel, at least 2^-12 of the median of those that vary.

        None if no channel varies, squares overflow, or no value is compared.
        """
        if not self._count or not self.num_values:
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
        sigma = self._sigma()
        if sigma is None:
            return None
        return float(np.sqrt((self._squares / np.square(sigma)).sum() / self.num_values))

    def max_sigma(self) -> float | None:
        """The largest ``error / sigma``; None without a sigma or a value."""
        sigma = self._sigma()
        return None if sigma is None else float((self._largest / sigma).max())


class StateErrors:
    """Gathers one layer, such as ``layer_005``, over samples."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._num_samples = 0
        self._values = ValueErrors()
        self._channels: ChannelErrors | None = None
        self._differences: ChannelErrors | None = None
        self._num_tokens = 0
        self._cosines = 0.0
        self._min_cosine: float | None = None
        self._num_neighbours = 0
        self._num_agreeing = 0

    @property
    def width(self) -> int | None:
        """Number of channels; None before the first sample."""
        return None if self._channels is None else self._channels.width

    def add(self, pair: ValuePair, previous: ValuePair | None, *, first: int) -> None:
        """Add the states ``(tokens, hidden)`` of one sample, as wide as those of other samples.

        `previous` are the same tokens in the compared layer before; None for the first layer, and
        where it has another width. Sigma is of the tokens from `first` on.
        """
        tokens, width = pair.error.shape
        self._num_samples += 1
        self._channels = self._channels or ChannelErrors(width)
        self._values.num_not_finite += pair.num_not_finite
        self._values.num_misplaced += pair.num_misplaced
        for rows in blocks(tokens, max(width, _BLOCK // _MOST_TOKENS), _BLOCK):
            part, skipped = pair.rows(rows), max(0, first - rows.start)
            self._add_values(part, self._channels)
            self._channels.add_reference(part.reference, part.finite, skipped, keep=True)
            if previous is not None:
                self._add_difference(part, previous.rows(rows), skipped)
        self._add_tokens(pair)

    def _add_values(self, pair: ValuePair, channels: ChannelErrors) -> None:
        channels.add_errors(pair.error, pair.num_finite)
        errors = np.abs(pair.error, out=_spare(pair.error))
        max_error = channels.add_largest(errors)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.divide(errors, pair.reference, out=errors)
        # Of zero and zero it is NaN, which these leave out; of zero and another value infinite.
        highest = np.fmax.reduce(relative, None, initial=0)
        lowest = np.fmin.reduce(relative, None, initial=0)
        zeros = pair.values[:2] == 0
        if np.isinf(highest) or np.isinf(lowest):
            relative[zeros[0]] = 0
            highest, lowest = relative.max(), relative.min()
        self._values.add(pair, zeros, max_error, float(max(highest, -lowest)))

    def _add_difference(self, pair: ValuePair, previous: ValuePair, first: int) -> None:
        self._differences = self._differences or ChannelErrors(pair.error.shape[1])
        change = np.subtract(pair.values[::2], previous.values[::2], out=_spare(pair.values[::2]))
        reference, error = change
        finite, count = None, error.size
        if pair.finite is not None or previous.finite is not None:
            finite = np.ones(error.shape, np.bool_)
            for each in (pair.finite, previous.finite):
                finite &= True if each is None else each
            error[~finite] = 0
            count = int(np.count_nonzero(finite))
        self._differences.add_errors(error, count)
        self._differences.add_reference(reference, finite, first, keep=False)

    def _add_tokens(self, pair: ValuePair) -> None:
        values, squares = pair.values, pair.squares
        if pair.finite is not None:
            rows = pair.finite_rows
            values, squares = values[:, rows], squares[:, rows]
        tokens = squares.shape[1]
        if not tokens:
            return
        norms = np.sqrt(squares.astype(np.float64))
        cosines = _cosines(*norms)
        self._num_tokens += tokens
        self._cosines += float(cosines.sum())
        lowest = float(cosines.min())
        self._min_cosine = lowest if self._min_cosine is None else min(lowest, self._min_cosine)
        if tokens > 1:
            self._num_neighbours += tokens
            self._num_agreeing += _num_agreeing(values[:2], norms[:2])

    def result(self) -> StateFidelity:
        """The measurements so far."""
        channels = self._channels or ChannelErrors(0)
        differences = self._differences or ChannelErrors(0)
        tokens, neighbours = self._num_tokens, self._num_neighbours
        return StateFidelity(
            name=self.name,
            num_samples=self._num_samples,
            nrmse=channels.nrmse(),
            max_sigma=channels.max_sigma(),
            num_tokens=tokens,
            mean_cosine=self._cosines / tokens if tokens else None,
            min_cosine=self._min_cosine,
            num_neighbours=neighbours,
            neighbour_agreement=self._num_agreeing / neighbours if neighbours else None,
            num_differences=differences.num_values,
            difference_nrmse=differences.nrmse(),
            **asdict(self._values),
        )


def blocks(rows: int, width: int, most: int) -> Iterator[slice]:
    """Rows at a time that have `most` values together."""
    size = max(1, most // max(1, width))
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


def row_squares(values: NDArray[Any]) -> NDArray[Any]:
    """Sums of squares over the last axis, by BLAS: with fewer roundings than by einsum."""
    found: NDArray[Any] = np.matmul(values[..., None, :], values[..., None])[..., 0, 0]
    return found


def _widen(values: NDArray[Any], out: NDArray[Any]) -> None:
    if values.dtype != np.float16:
        np.copyto(out, values)
    elif out.dtype == np.float32:
        float16_to_float32(values, out)
    else:
        floats = _SPARE.take(4 * values.size).view(np.float32).reshape(values.shape)
        float16_to_float32(values, floats)
        np.copyto(out, floats)


def _spare(values: NDArray[Any]) -> NDArray[Any]:
    """Memory for another such array, until the next call in this thread."""
    return _SPARE.take(values.nbytes).view(values.dtype).reshape(values.shape)


def _cosines(
    norms_a: NDArray[np.float64], norms_b: NDArray[np.float64], norms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cosines from the lengths of two vectors and of their difference.

    ``1 - (|b - a|^2 - (|a| - |b|)^2) / (2 |a| |b|)`` keeps all digits near 1, and is 1 for equal
    ones. Of zero and zero it is 1, of zero and another one 0.
    """
    product = 2 * norms_a * norms_b
    distance = np.square(norms) - np.square(norms_a - norms_b)
    away = (norms > 0).astype(np.float64)
    np.divide(np.maximum(distance, 0), product, out=away, where=product > 0)
    return 1 - away


def _num_agreeing(values: NDArray[Any], norms: NDArray[np.float64]) -> int:
    """Tokens whose nearest tokens in A and in B, ties included, have one in common."""
    tokens, count = values.shape[1], 0
    scales = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0).astype(values.dtype)
    for rows in blocks(tokens, tokens, _BLOCK_COSINES):
        cosines = values[:, rows] @ values.swapaxes(1, 2)
        cosines *= scales[:, rows, None]
        cosines *= scales[:, None]
        if not scales.all():
            # Values whose squares overflow.
            cosines[np.isnan(cosines)] = 0
        some = np.arange(cosines.shape[1])
        cosines[:, some, some + rows.start] = -np.inf
        nearest = cosines >= cosines.max(axis=2, keepdims=True) - TIE
        count += int(np.count_nonzero((nearest[0] & nearest[1]).any(axis=1)))
    return count
