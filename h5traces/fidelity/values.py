"""Two arrays side by side, and what every kind of values is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from h5traces import half

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


def widened(values: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """`values` as float32 or float64, C-contiguous; float16 through a table, as numpy is slow."""
    if values.dtype == np.float16:
        narrow = half.to_float32(np.ascontiguousarray(values))
        wide: NDArray[Any] = narrow.astype(dtype, copy=False)
        return wide
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
