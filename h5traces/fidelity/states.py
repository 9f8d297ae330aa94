"""Measures of one layer's hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.fidelity.channels import ChannelErrors
from h5traces.fidelity.reports import StateFidelity
from h5traces.fidelity.values import ValueErrors, ValuePair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

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
