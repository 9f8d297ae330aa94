"""Measures of one layer's hidden states, and what all values are measured by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from h5traces.fidelity.reports import StateFidelity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import DTypeLike, NDArray

# The smallest sigma of a channel, as a share of the median of its layer; as for scales.
DEAD: Final = 2.0**-12
# Cosines that differ by less are equal: float32 computes them no better, and no states stored as
# float16 differ by less.
TIE: Final = 1e-6
# Values at a time, so that intermediate results stay in the processor's cache.
_BLOCK: Final = 1 << 17
# Products up to which BLAS starts no threads (OpenBLAS; others may at fewer). Threads of small ones
# wait for each other, and for those of this process, longer than the product takes.
_SMALL_PRODUCT: Final = 1 << 18
_FEW_TOKENS: Final = 64
# Cosines at a time.
_BLOCK_COSINES: Final = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class ValuePair:
    """Values of A and B, and B's minus A's: float32 or float64, of one shape.

    What is not finite in A or B is zero in both; counts are as in `LayerFidelity`.
    """

    reference: NDArray[Any]
    restored: NDArray[Any]
    error: NDArray[Any]
    # Where A and B are finite; None if all are.
    finite: NDArray[np.bool_] | None = None
    num_not_finite: int = 0
    num_misplaced: int = 0

    @classmethod
    def of(cls, reference: NDArray[Any], restored: NDArray[Any], dtype: DTypeLike) -> Self:
        """The pair of two arrays of one shape, computed in `dtype`."""
        a, b = (np.ascontiguousarray(each, dtype) for each in (reference, restored))
        with np.errstate(invalid="ignore", over="ignore"):
            error = b - a
        if np.isfinite(error).all():
            return cls(a, b, error)
        finite = np.isfinite(a) & np.isfinite(b)
        odd = ~finite
        same = (a[odd] == b[odd]) | (np.isnan(a[odd]) & np.isnan(b[odd]))
        counts = int(np.count_nonzero(~np.isfinite(a))), int(np.count_nonzero(~same))
        a, b, error = (np.where(finite, each, 0) for each in (a, b, error))
        return cls(a, b, error, finite, *counts)

    def rows(self, rows: slice) -> ValuePair:
        """Some of the rows, without counts."""
        finite = None if self.finite is None else self.finite[rows]
        return ValuePair(self.reference[rows], self.restored[rows], self.error[rows], finite)

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

    def add(self, pair: ValuePair) -> NDArray[Any]:
        """Add a pair; returns the magnitudes of its errors."""
        self.num_values += pair.num_finite
        self.num_not_finite += pair.num_not_finite
        self.num_misplaced += pair.num_misplaced
        errors: NDArray[Any] = np.abs(pair.error)
        self.max_error = max(self.max_error, float(errors.max(initial=0)))
        nonzero = pair.reference != 0
        if nonzero.all():
            relative = errors / pair.reference
        else:
            relative = np.zeros_like(errors)
            np.divide(errors, pair.reference, out=relative, where=nonzero)
            self.num_from_zero += int(np.count_nonzero(errors[~nonzero]))
        largest = max(float(relative.max(initial=0)), -float(relative.min(initial=0)))
        self.max_relative = max(self.max_relative, largest)
        if not pair.restored.all():
            self.num_to_zero += int(np.count_nonzero((pair.restored == 0) & nonzero))
        return errors


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
        """Add magnitudes of errors ``(tokens, width)``; `num_values` of them are compared."""
        self.num_values += num_values
        self._squares += np.einsum("ij,ij->j", errors, errors)
        np.maximum(self._largest, errors.max(axis=0, initial=0), out=self._largest)

    def add_reference(
        self, values: NDArray[Any], finite: NDArray[np.bool_] | None, first: int
    ) -> None:
        """Add the tokens of A from `first` on whose values are all finite, ``(tokens, width)``."""
        values = values[first:] if finite is None else values[first:][finite[first:].all(axis=1)]
        if not len(values):
            return
        if self._origin is None:
            self._origin = values[0].copy()
        away = values - self._origin
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
        for rows in blocks(tokens, width, _BLOCK):
            part, skipped = pair.rows(rows), max(0, first - rows.start)
            self._channels.add_errors(self._values.add(part), part.num_finite)
            self._channels.add_reference(part.reference, part.finite, skipped)
            if previous is not None:
                self._add_difference(part, previous.rows(rows), skipped)
        self._add_tokens(pair)

    def _add_difference(self, pair: ValuePair, previous: ValuePair, first: int) -> None:
        self._differences = self._differences or ChannelErrors(pair.error.shape[1])
        change = pair.error - previous.error
        finite, count = None, change.size
        if pair.finite is not None or previous.finite is not None:
            finite = np.ones(change.shape, np.bool_)
            for each in (pair.finite, previous.finite):
                finite &= True if each is None else each
            change[~finite] = 0
            count = int(np.count_nonzero(finite))
        self._differences.add_errors(change, count)
        self._differences.add_reference(pair.reference - previous.reference, finite, first)

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
            self._num_agreeing += _num_agreeing(_unit(a, norms_a), _unit(b, norms_b))

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


def _num_agreeing(units_a: NDArray[Any], units_b: NDArray[Any]) -> int:
    """Tokens whose nearest tokens in A and in B, ties included, have one in common."""
    count = 0
    for rows in blocks(len(units_a), len(units_a), _BLOCK_COSINES):
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
    other = units.copy()  # numpy multiplies an array with itself in another way, with threads
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
