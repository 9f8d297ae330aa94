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
            zeros = pair.values[:2] == 0
            ratios = np.ones_like(pair.error)
            with np.errstate(over="ignore"):
                np.divide(pair.values[1], pair.reference, out=ratios, where=~zeros[0])
                sums = pair.squares.sum(axis=(1, 2))
            self._reference_squares += float(sums[0])
            self._squares += float(sums[2])
            max_error = max(float(pair.error.max(initial=0)), -float(pair.error.min(initial=0)))
            max_relative = max(float(ratios.max(initial=1)) - 1, 1 - float(ratios.min(initial=1)))
            self._values.add(pair, zeros, max_error, max_relative)
            self._add_edges(pair, queries.start)
            self._add_rows(pair, ratios)

    def _add_edges(self, pair: ValuePair, first_query: int) -> None:
        if not len(pair.error):
            return
        queries, keys = pair.error.shape[1:]
        causal = np.tri(queries, keys, first_query, dtype=np.bool_)
        if pair.finite is not None:
            causal &= pair.finite.all(axis=0)
        # As `h5traces.graph` compares: in float32.
        means = pair.values[:2].mean(axis=1).astype(np.float32)
        edges, found = (means > np.float32(self._threshold)) & causal
        num_edges, num_found, num_both = map(np.count_nonzero, (edges, found, edges & found))
        self._num_edges += int(num_edges)
        self._num_added += int(num_found - num_both)
        self._num_removed += int(num_edges - num_both)

    def _add_rows(self, pair: ValuePair, ratios: NDArray[Any]) -> None:
        divergences = row_divergences(pair.values[:2], ratios)
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


def row_divergences(weights: NDArray[Any], ratios: NDArray[Any]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of B's rows from A's, in nats, both scaled to sum to 1.

    ``sum(p * ln(p / q))`` over the keys with p > 0. Where a weight of A is zero in B, it counts
    as 2^-24 there, the smallest float16, or as A's own if that is smaller. Rows without weights
    in A are NaN. Takes float64 ``(2, ..., key)`` of A and B, and returns ``(...)``; `ratios` are
    B's weights in terms of A's, 1 where A's are zero, and are overwritten.
    """
    if weights.min(initial=0) < 0:
        weights = np.maximum(weights, 0)
        ratios = np.divide(weights[1], weights[0], out=np.ones_like(ratios), where=weights[0] > 0)
    a, b = weights
    lost = ratios == 0
    if lost.any():
        b = np.where(lost, np.minimum(a, SMALLEST), b)
        ratios[lost] = b[lost] / a[lost]
    logs = np.log(ratios, out=ratios)
    sums_a, sums_b = (np.einsum("...k->...", each) for each in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(sums_b / sums_a) - np.einsum("...k,...k->...", a, logs) / sums_a
    divergences: NDArray[np.float64] = np.maximum(found, 0)
    return divergences
