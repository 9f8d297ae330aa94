"""Measures of one layer's hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from h5traces.fidelity.reports import StateFidelity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import DTypeLike, NDArray


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


def widened(values: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """`values` as float32 or float64, C-contiguous."""
    return np.ascontiguousarray(values, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ValuePair:
    """Values of both archives; what is not finite in either of them is zero in both.

    Attributes
    ----------
    reference, restored, error
        Values of A, of B, and how much B's are larger; float32 or float64, of one shape.
    finite
        Where both are finite; None where all are.
    num_not_finite
        Values of A that are NaN or infinite.
    num_misplaced
        Places where one is NaN or infinite and the other is not the same.
    """

    reference: NDArray[Any]
    restored: NDArray[Any]
    error: NDArray[Any]
    finite: NDArray[np.bool_] | None = None
    num_not_finite: int = 0
    num_misplaced: int = 0

    @classmethod
    def of(cls, reference: NDArray[Any], restored: NDArray[Any], dtype: DTypeLike) -> Self:
        """The pair of two arrays of one shape, computed in `dtype`."""
        a, b = widened(reference, dtype), widened(restored, dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            error = b - a
        finite: NDArray[np.bool_] = np.isfinite(error)
        if finite.all():
            return cls(a, b, error)
        finite = np.logical_and(np.isfinite(a), np.isfinite(b))
        odd = ~finite
        same = (a[odd] == b[odd]) | (np.isnan(a[odd]) & np.isnan(b[odd]))
        counts = int(np.count_nonzero(~np.isfinite(a))), int(np.count_nonzero(~same))
        a, b, error = (np.where(finite, each, 0) for each in (a, b, error))
        return cls(a, b, error, finite, *counts)

    @property
    def num_finite(self) -> int:
        """Values that can be compared."""
        return self.error.size if self.finite is None else int(np.count_nonzero(self.finite))

    @property
    def finite_rows(self) -> NDArray[np.bool_]:
        """Rows (of the last axis) without a value that is not finite."""
        if self.finite is None:
            return np.ones(self.error.shape[:-1], np.bool_)
        rows: NDArray[np.bool_] = np.logical_and.reduce(self.finite, axis=-1)
        return rows


@dataclass(slots=True)
class ValueErrors:
    """What all values are measured by, whatever they mean.

    Attributes
    ----------
    num_values, num_not_finite, num_misplaced
        Values compared; and as in `ValuePair`.
    max_error
        The largest error.
    max_relative
        The largest ratio of an error to the value of A, where that is not zero.
    num_from_zero, num_to_zero
        Zeros of A that are none in B, and the other way round.
    """

    num_values: int = 0
    num_not_finite: int = 0
    num_misplaced: int = 0
    max_error: float = 0.0
    max_relative: float = 0.0
    num_from_zero: int = 0
    num_to_zero: int = 0

    def add(self, pair: ValuePair) -> NDArray[Any]:
        """Take in a pair; gives the magnitudes of its errors."""
        self.num_values += pair.num_finite
        self.num_not_finite += pair.num_not_finite
        self.num_misplaced += pair.num_misplaced
        errors: NDArray[Any] = np.abs(pair.error)
        self.max_error = max(self.max_error, float(errors.max(initial=0)))
        nonzero = pair.reference != 0
        num_zeros = nonzero.size - int(np.count_nonzero(nonzero))
        if num_zeros:
            relative = np.zeros_like(errors)
            np.divide(errors, pair.reference, out=relative, where=nonzero)
            self.num_from_zero += int(np.count_nonzero(errors[~nonzero]))
        else:
            relative = errors / pair.reference
        largest = max(float(relative.max(initial=0)), -float(relative.min(initial=0)))
        self.max_relative = max(self.max_relative, largest)
        restored_zeros = pair.restored.size - int(np.count_nonzero(pair.restored))
        if restored_zeros:
            self.num_to_zero += int(np.count_nonzero((pair.restored == 0) & nonzero))
        return errors


# Cosines that differ by less are equal: float32 computes them no better, and float16 stores no
# states that would tell them apart.
TIE: Final = 1e-6
# Values at a time: what is computed on the way stays in the processor's cache.
_BLOCK: Final = 1 << 17
# Products up to which BLAS starts no threads (OpenBLAS; others may at fewer). The threads of small
# ones wait for each other, beside ours and other programs', longer than the product takes.
_SMALL_PRODUCT: Final = 1 << 18
_FEW_TOKENS: Final = 64
# Cosines at a time.
_BLOCK_COSINES: Final = 1 << 22


class StateErrors:
    """Gathers one layer over samples.

    Parameters
    ----------
    name
        Of the dataset, such as ``layer_005``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._num_samples = 0
        self._values = ValueErrors()
        self._channels: ChannelErrors | None = None
        self._steps: ChannelErrors | None = None
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
        """Take in the states of one sample.

        Parameters
        ----------
        pair
            ``(tokens, hidden)``; of the width of those before.
        previous
            The same tokens behind the compared layer before; None where there is none, or it is of
            another width.
        first
            The first token that deviations are of.
        """
        tokens, width = pair.error.shape
        self._num_samples += 1
        self._channels = self._channels or ChannelErrors(width)
        if previous is not None:
            self._steps = self._steps or ChannelErrors(width)
        self._values.num_not_finite += pair.num_not_finite
        self._values.num_misplaced += pair.num_misplaced
        for rows in _blocks(tokens, width, _BLOCK):
            self._add_rows(
                _rows(pair, rows),
                None if previous is None else _rows(previous, rows),
                max(0, first - rows.start),
            )
        self._add_tokens(pair)

    def _add_rows(self, pair: ValuePair, previous: ValuePair | None, first: int) -> None:
        assert self._channels is not None
        errors = self._values.add(pair)
        self._channels.add_errors(errors, pair.num_finite)
        self._channels.add_reference(_usable(pair.reference, pair.finite, first))
        if previous is None:
            return
        assert self._steps is not None
        step = pair.reference - previous.reference
        change = pair.error - previous.error
        finite = _both(pair.finite, previous.finite)
        if finite is not None:
            change[~finite] = 0
        count = change.size if finite is None else int(np.count_nonzero(finite))
        self._steps.add_errors(change, count)
        self._steps.add_reference(_usable(step, finite, first))

    def _add_tokens(self, pair: ValuePair) -> None:
        a, b, error = pair.reference, pair.restored, pair.error
        if pair.finite is not None:
            rows = pair.finite_rows
            a, b, error = a[rows], b[rows], error[rows]
        if not len(a):
            return
        norms_a, norms_b, norms = (np.sqrt(_squares(each)) for each in (a, b, error))
        cosines = _cosines(norms_a, norms_b, norms)
        self._num_tokens += len(a)
        self._cosines += float(cosines.sum())
        lowest = float(cosines.min())
        self._min_cosine = lowest if self._min_cosine is None else min(lowest, self._min_cosine)
        if len(a) > 1:
            self._num_neighbours += len(a)
            self._num_agreeing += _agreeing(_unit(a, norms_a), _unit(b, norms_b))

    def result(self) -> StateFidelity:
        """What was measured."""
        values, channels = self._values, self._channels or ChannelErrors(0)
        steps, tokens = self._steps or ChannelErrors(0), self._num_tokens
        return StateFidelity(
            name=self.name,
            num_samples=self._num_samples,
            num_values=values.num_values,
            nrmse=channels.nrmse(),
            max_sigma=channels.max_sigma(),
            max_error=values.max_error,
            max_relative=values.max_relative,
            num_from_zero=values.num_from_zero,
            num_to_zero=values.num_to_zero,
            num_tokens=tokens,
            mean_cosine=self._cosines / tokens if tokens else None,
            min_cosine=self._min_cosine,
            num_neighbours=self._num_neighbours,
            neighbour_agreement=(
                self._num_agreeing / self._num_neighbours if self._num_neighbours else None
            ),
            num_differences=steps.num_values,
            difference_nrmse=steps.nrmse(),
            num_not_finite=values.num_not_finite,
            num_misplaced=values.num_misplaced,
        )


def _blocks(rows: int, width: int, most: int) -> Iterator[slice]:
    size = max(1, most // max(1, width))
    return (slice(start, min(rows, start + size)) for start in range(0, rows, size))


def _rows(pair: ValuePair, rows: slice) -> ValuePair:
    finite = None if pair.finite is None else pair.finite[rows]
    return ValuePair(pair.reference[rows], pair.restored[rows], pair.error[rows], finite)


def _both(
    first: NDArray[np.bool_] | None, second: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _usable(values: NDArray[Any], finite: NDArray[np.bool_] | None, first: int) -> NDArray[Any]:
    """Rows from `first` on, without those that are not finite throughout."""
    return values[first:] if finite is None else values[first:][finite[first:].all(axis=1)]


def _squares(values: NDArray[Any]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.einsum("ij,ij->i", values, values).astype(np.float64)
    return found


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


def _unit(values: NDArray[Any], norms: NDArray[np.float64]) -> NDArray[Any]:
    """Rows of length 1; rows of zeros stay."""
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    found: NDArray[Any] = values * scale.astype(values.dtype)[:, None]
    return found


def _agreeing(units_a: NDArray[Any], units_b: NDArray[Any]) -> int:
    """Tokens that have a nearest one in common, which ties there are included."""
    count = 0
    for rows in _blocks(len(units_a), len(units_a), _BLOCK_COSINES):
        common = _nearest(units_a, rows) & _nearest(units_b, rows)
        count += int(np.count_nonzero(common.any(axis=1)))
    return count


def _nearest(units: NDArray[Any], rows: slice) -> NDArray[np.bool_]:
    """For some tokens, which others are nearest: ``(some, tokens)``."""
    cosines = _products(units[rows], units)
    some = np.arange(len(cosines))
    cosines[some, some + rows.start] = -np.inf
    nearest: NDArray[np.bool_] = cosines >= cosines.max(axis=1, keepdims=True) - TIE
    return nearest


def _products(some: NDArray[Any], units: NDArray[Any]) -> NDArray[Any]:
    """``some @ units.T``; of few tokens in parts of the channels, in this thread alone."""
    other = units.copy()  # a product of an array with itself would go another way, with threads
    whole = some.shape[1]
    part = _SMALL_PRODUCT // (len(some) * len(units))
    if max(len(some), len(units)) > _FEW_TOKENS or whole <= part:
        found: NDArray[Any] = some @ other.T
        return found
    fitting = whole // part * part
    left, right = (each[:, :fitting].reshape(len(each), -1, part) for each in (some, other))
    parts = np.matmul(left.transpose(1, 0, 2), right.transpose(1, 2, 0))
    rest = some[:, fitting:] @ other[:, fitting:].T
    total: NDArray[Any] = parts.sum(axis=0) + rest
    return total
