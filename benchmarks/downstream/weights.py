"""Attention weights through the encodings, and the graphs that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from downstream.coding import chunk_nbytes
from h5traces.format.dtypes import TypedArray
from h5traces.precision import attention
from h5traces.precision.attention import HeadMean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from downstream.capturing import Trace

THRESHOLD: Final = 0.01
HEAD_MEAN: Final = "head mean"
# Added to every weight before rows are compared, so that what became zero has a logarithm.
SMOOTHING: Final = 1e-6

# Stored array, and what it is restored to.
_Coded = tuple["NDArray[Any]", "NDArray[Any]"]


def _levels(bits: int) -> Callable[[NDArray[Any]], _Coded]:
    def code(weights: NDArray[Any]) -> _Coded:
        if not ((weights >= 0) & (weights <= 1)).all():
            message = "attention weights outside 0 to 1: is this a softmax?"
            raise SystemExit(message)
        # As archives have it at 8 bits: halves go down.
        levels = (1 << bits) - 1
        roots = np.sqrt(weights.astype(np.float64)) * levels
        stored = np.ceil(roots - 0.5).astype(np.uint8)
        return stored, attention.from_levels(stored, levels, as_half=True)

    return code


def _rounded(weights: NDArray[Any]) -> _Coded:
    values = attention.rounded(weights, 5)
    return values, values


def _exact(weights: NDArray[Any]) -> _Coded:
    return weights, weights


WEIGHTS: Final[dict[str, Callable[[NDArray[Any]], _Coded]]] = {
    "float16": _exact,
    "5 mantissa bits": _rounded,
    "8 bits": _levels(8),
    "6 bits": _levels(6),
    "5 bits": _levels(5),
}


def head_mean(weights: NDArray[np.float16]) -> NDArray[np.float32]:
    """As archives have it."""
    found: NDArray[np.float32] = HeadMean(TypedArray(weights, "float16")).load().values
    return found


def edges(mean: NDArray[Any]) -> NDArray[np.bool_]:
    """Where `h5traces.graph` puts an edge: ``(query, key)``."""
    found: NDArray[np.bool_] = np.tril(mean.astype(np.float32) > np.float32(THRESHOLD))
    return found


class _Sums:
    def __init__(self) -> None:
        self.nbytes = self.entries = self.edges = self.flips = self.rows = 0
        self.kl = 0.0

    def summary(self) -> dict[str, float]:
        return {
            "bits_per_entry": 8 * self.nbytes / self.entries,
            "edges": self.edges,
            "flips": self.flips,
            "flip_share": self.flips / max(1, self.edges),
            "kl_per_row": self.kl / max(1, self.rows),
        }


def measure_weights(traces: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """Bits per entry, edges that flip and KL per row, by encoding.

    Flips are a share of the edges that the original has. The head mean's bits are per entry of it,
    and per head in ``bits_per_attention``.
    """
    sums = {name: _Sums() for name in (*WEIGHTS, HEAD_MEAN)}
    for trace in traces:
        for weights in trace.attentions:
            mean = head_mean(weights)
            before = edges(mean)
            for name, code in WEIGHTS.items():
                stored, values = code(np.ascontiguousarray(weights))
                _add(sums[name], stored, before, head_mean(values))
                sums[name].kl += divergence(weights, values)
                sums[name].rows += weights.shape[0] * weights.shape[1]
            stored, _ = attention.to_levels(mean)
            restored = attention.from_levels(stored, attention.LEVELS, as_half=True)
            _add(sums[HEAD_MEAN], stored, before, restored)
            sums[HEAD_MEAN].kl += divergence(mean, restored)
            sums[HEAD_MEAN].rows += len(mean)
    found = {name: each.summary() for name, each in sums.items()}
    num_heads = traces[0].attentions.shape[1]
    bits = found[HEAD_MEAN]["bits_per_entry"]
    found[HEAD_MEAN]["bits_per_attention"] = bits / num_heads
    return found


def _add(sums: _Sums, stored: NDArray[Any], before: NDArray[np.bool_], mean: NDArray[Any]) -> None:
    sums.nbytes += chunk_nbytes(stored)
    sums.entries += stored.size
    sums.edges += int(before.sum())
    sums.flips += int((edges(mean) != before).sum())


def divergence(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Sum over rows of the KL of what was restored to what there was, in nats."""
    p, q = (each.astype(np.float64) + SMOOTHING for each in (before, after))
    p /= p.sum(axis=-1, keepdims=True)
    q /= q.sum(axis=-1, keepdims=True)
    return float((p * np.log(p / q)).sum())


def flip_share(before: Sequence[Trace], after: Sequence[Trace]) -> float:
    """Edges that two runs of a model do not share, of those of the first."""
    flips = total = 0
    for one, other in zip(before, after, strict=True):
        for weights, changed in zip(one.attentions, other.attentions, strict=True):
            found = edges(head_mean(weights))
            flips += int((edges(head_mean(changed)) != found).sum())
            total += int(found.sum())
    return flips / max(1, total)
