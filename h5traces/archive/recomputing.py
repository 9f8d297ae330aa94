"""Attention weights from stored queries and keys, in blocks of rows: never the whole square."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import CorruptArchiveError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.format.attention import AttentionRule

# Rows of one head that are computed at a time.
_BLOCK_ROWS: Final = 256


def check_shapes(
    queries: tuple[int, ...], keys: tuple[int, ...], rule: AttentionRule, place: str
) -> None:
    """Raise CorruptArchiveError for queries ``(A, S, D)`` and keys ``(K, S, D)`` that do not fit.

    K divides A.
    """
    fits = len(queries) == len(keys) == 3 and queries[1:] == keys[1:]
    if not fits or not keys[0] or queries[0] % keys[0]:
        message = (
            f"{place}: queries {queries} and keys {keys} make no attention; expected (heads, "
            "tokens, channels) with the same tokens and channels, and whole groups of heads"
        )
        raise CorruptArchiveError(message)
    if rule.sinks is not None and len(rule.sinks) != queries[0]:
        message = f"{place}: {len(rule.sinks)} sinks for {queries[0]} heads, expected one for each"
        raise CorruptArchiveError(message)


def attention_weights(
    queries: NDArray[Any],
    keys: NDArray[Any],
    rule: AttentionRule,
    *,
    heads: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Weights ``(heads, rows, S)`` of some heads and query positions, in float32.

    In threads; measured, torch on a CPU is no faster (``benchmarks/long_traces.py``).

    Parameters
    ----------
    queries, keys
        ``(A, S, D)`` and ``(K, S, D)``; head h of the queries belongs to head h K / A of the keys.
    rule
        Scale, cap, sinks and mask.
    heads, rows
        Numbers of heads and of query positions.
    """
    found = np.zeros((len(heads), len(rows), keys.shape[1]), np.float32)

    def fill(place: int) -> None:
        head = heads[place]
        asked = queries[head].astype(np.float32, copy=False)
        known = keys[head * len(keys) // len(queries)].astype(np.float32, copy=False)
        sink = None if rule.sinks is None else rule.sinks[head]
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = rows[start : start + _BLOCK_ROWS]
            out = found[place, start : start + _BLOCK_ROWS]
            _fill_rows(out, asked[part] * np.float32(rule.scale), known, rule, part, sink)

    workers = max(1, min(len(heads), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, range(len(heads))))
    return found


def _fill_rows(
    out: NDArray[np.float32],
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    rule: AttentionRule,
    rows: NDArray[np.int64],
    sink: float | None,
) -> None:
    """Rows of one head, of scaled queries ``(rows, D)``."""
    first, end = rule.seen(rows, len(keys))
    low, high = int(first.min()), int(end.max())
    scores = out[:, low:high]
    np.matmul(queries, keys[low:high].T, out=scores)
    if rule.soft_cap is not None:
        scores /= np.float32(rule.soft_cap)
        np.tanh(scores, out=scores)
        scores *= np.float32(rule.soft_cap)
    # Only at the edges some queries see a key and others do not.
    for start, stop in ((low, int(first.max())), (max(low, int(end.min())), high)):
        if start < stop:
            columns = np.arange(start, stop)
            hidden = (columns < first[:, None]) | (columns >= end[:, None])
            np.copyto(out[:, start:stop], -np.inf, where=hidden)
    top = scores.max(axis=1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, np.float32(sink))
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=1, keepdims=True)
    if sink is not None:
        total += np.exp(np.float32(sink) - top)
    scores /= total
