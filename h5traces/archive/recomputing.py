"""Attention weights from stored queries and keys, in blocks of rows: never the whole square."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import CorruptArchiveError
from h5traces.storage.threads import one_blas_thread, shared_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    for name, values in (("sinks", rule.sinks), ("slopes", rule.slopes)):
        if values is not None and len(values) != queries[0]:
            message = f"{place}: {len(values)} {name} for {queries[0]} heads, expected one for each"
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

    In threads; measured, torch on a CPU was slower (``benchmarks/long_traces.py``).

    Parameters
    ----------
    queries, keys
        ``(A, S, D)`` and ``(K, S, D)``; head h of the queries belongs to head h K / A of the keys.
    rule
        Scale, cap, slopes, sinks and mask.
    heads, rows
        Numbers of heads and of query positions.
    """
    found = np.zeros((len(heads), len(rows), keys.shape[1]), np.float32)

    def fill(place: int) -> None:
        head = heads[place]
        asked = queries[head].astype(np.float32, copy=False)
        known = keys[head * len(keys) // len(queries)].astype(np.float32, copy=False)
        sink = None if rule.sinks is None else rule.sinks[head]
        slope = None if rule.slopes is None else rule.slopes[head]
        for block in row_blocks(rule, rows, len(known)):
            scaled = asked[block.rows] * np.float32(rule.scale)
            _fill_rows(found[place, block.place], scaled, known, rule, block, (slope, sink))

    workers = max(1, min(len(heads), os.cpu_count() or 1))
    with one_blas_thread if workers > 1 else contextlib.nullcontext():
        list((map if workers == 1 else shared_pool(workers).map)(fill, range(len(heads))))
    return found


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Some query positions, and what of the keys they see: `low` to `high` - 1, all of them.

    ``first`` and ``end`` are the first key that each query sees and the one after its last.
    """

    place: slice
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]

    @property
    def low(self) -> int:
        """The first key that any query sees."""
        return int(self.first.min())

    @property
    def high(self) -> int:
        """The key after the last that any query sees."""
        return int(self.end.max())

    @property
    def distances(self) -> NDArray[np.float32]:
        """How much further on than each query each key from `low` to `high` - 1 is."""
        columns = np.arange(self.low, self.high)
        return (columns - self.rows[:, None]).astype(np.float32)

    @property
    def edges(self) -> Iterator[tuple[int, int]]:
        """Ranges of keys from `low` on that some queries see and others do not."""
        for start, stop in (
            (self.low, int(self.first.max())),
            (max(self.low, int(self.end.min())), self.high),
        ):
            if start < stop:
                yield start, stop


def row_blocks(rule: AttentionRule, rows: NDArray[np.int64], num_keys: int) -> Iterator[RowBlock]:
    """The query positions `rows` in blocks that caches hold."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        place = slice(start, start + _BLOCK_ROWS)
        yield RowBlock(place, rows[place], *rule.seen(rows[place], num_keys))


def _fill_rows(
    out: NDArray[np.float32],
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    rule: AttentionRule,
    block: RowBlock,
    of_head: tuple[float | None, float | None],
) -> None:
    """Rows of one head, of scaled queries ``(rows, D)``; `of_head` are its slope and its sink."""
    slope, sink = of_head
    scores = out[:, block.low : block.high]
    np.matmul(queries, keys[block.low : block.high].T, out=scores)
    if rule.soft_cap is not None:
        scores /= np.float32(rule.soft_cap)
        np.tanh(scores, out=scores)
        scores *= np.float32(rule.soft_cap)
    if slope is not None:
        scores += np.float32(slope) * block.distances
    for start, stop in block.edges:
        columns = np.arange(start, stop)
        hidden = (columns < block.first[:, None]) | (columns >= block.end[:, None])
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


def weights_of_window(
    window: NDArray[Any], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[Any]:
    """Weights ``(heads, rows, columns)`` out of those of the last W keys of every query.

    Parameters
    ----------
    window
        ``(heads, rows, W)``, the kind ``attention_window``.
    rows, columns
        Positions of queries and keys.

    Returns
    -------
    numpy.ndarray
        NaN where a weight is not stored, 0 for keys after the query.
    """
    width = window.shape[2]
    entries = columns - rows[:, None] + width - 1
    found = np.take_along_axis(window, np.clip(entries, 0, width - 1)[None], axis=2)
    found[:, entries >= width] = 0
    found[:, entries < 0] = np.nan
    return found
