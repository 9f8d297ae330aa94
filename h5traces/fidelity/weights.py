"""Measures of one layer's attention weights, or of their mean over heads."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.fidelity.reports import WeightFidelity
from h5traces.fidelity.states import ValueErrors, ValuePair, blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The smallest float16. A weight that is zero in B counts as this: a logarithm of 0 is infinite.
SMALLEST: Final = 2.0**-24
# Values at a time, so that intermediate results stay in the processor's cache.
_BLOCK: Final = 1 << 16


class WeightErrors:
    """Gathers one layer, such as ``layer_005``, over samples."""

    def __init__(self, name: str, threshold: float) -> None:
        self.name = name
        self._threshold = threshold
        self._num_samples = 0
        self._values = ValueErrors()
        self._squares = 0.0
        self._reference_squares = 0.0
        self._num_edges = 0
        self._num_added = 0
        self._num_removed = 0
        self._num_rows = 0
        self._divergences = 0.0
        self._max_divergence = 0.0

    def add(self, reference: NDArray[Any], restored: NDArray[Any]) -> None:
        """Add the weights of one sample: both ``(heads, query, key)``, or ``(query, key)``."""
        self._num_samples += 1
        a, b = (each[None] if each.ndim == 2 else each for each in (reference, restored))
        heads, num_queries, keys = a.shape
        for queries in blocks(num_queries, heads * keys, _BLOCK):
            pair = ValuePair.of(a[:, queries], b[:, queries], np.float64)
            self._values.add(pair)
            self._squares += _square_sum(pair.error)
            self._reference_squares += _square_sum(pair.reference)
            self._add_edges(pair, queries.start)
            self._add_rows(pair)

    def _add_edges(self, pair: ValuePair, first_query: int) -> None:
        if not len(pair.error):
            return
        queries, keys = pair.error.shape[1:]
        causal = np.tri(queries, keys, first_query, dtype=np.bool_)
        if pair.finite is not None:
            causal &= pair.finite.all(axis=0)
        # As `h5traces.graph` compares: in float32.
        edges, found = (
            (each.mean(axis=0).astype(np.float32) > np.float32(self._threshold)) & causal
            for each in (pair.reference, pair.restored)
        )
        self._num_edges += int(np.count_nonzero(edges))
        self._num_added += int(np.count_nonzero(found & ~edges))
        self._num_removed += int(np.count_nonzero(edges & ~found))

    def _add_rows(self, pair: ValuePair) -> None:
        divergences = row_divergences(pair.reference, pair.restored)
        divergences = divergences[pair.finite_rows & ~np.isnan(divergences)]
        if divergences.size:
            self._num_rows += divergences.size
            self._divergences += float(divergences.sum())
            self._max_divergence = max(self._max_divergence, float(divergences.max()))

    def result(self) -> WeightFidelity:
        """The measurements so far."""
        values, rows = self._values, self._num_rows
        size = self._reference_squares
        return WeightFidelity(
            name=self.name,
            num_samples=self._num_samples,
            nrmse=float(np.sqrt(self._squares / size)) if size else None,
            rms=float(np.sqrt(size / values.num_values)) if values.num_values else None,
            num_edges=self._num_edges,
            num_added=self._num_added,
            num_removed=self._num_removed,
            num_rows=rows,
            mean_kl=self._divergences / rows if rows else None,
            max_kl=self._max_divergence if rows else None,
            **asdict(values),
        )


def row_divergences(reference: NDArray[Any], restored: NDArray[Any]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of B's rows from A's, in nats, both scaled to sum to 1.

    ``sum(p * ln(p / q))`` over the keys with p > 0. Where a weight of A is zero in B, it counts
    as 2^-24 there, the smallest float16, or as A's own if that is smaller. Rows without weights
    in A are NaN. Takes float64 ``(..., key)``, and returns ``(...)``.
    """
    positive = reference > 0
    a = np.where(positive, reference, 0)
    b = np.maximum(restored, 0)
    lost = positive & (b == 0)
    if lost.any():
        b[lost] = np.minimum(a[lost], SMALLEST)
    terms = np.divide(a, b, out=np.ones_like(a), where=positive)
    np.log(terms, out=terms)
    np.multiply(terms, a, out=terms)
    sums_a, sums_b = a.sum(axis=-1), b.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = terms.sum(axis=-1) / sums_a + np.log(sums_b / sums_a)
    divergences: NDArray[np.float64] = np.maximum(found, 0)
    return divergences


def _square_sum(values: NDArray[Any]) -> float:
    flat = values.reshape(-1)
    # Not `flat @ flat`, for which BLAS starts threads that wait for each other.
    return float(np.einsum("i,i->", flat, flat))
