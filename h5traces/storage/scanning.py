"""Compares every byte of an archive's HDF5 part with checksums."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from h5traces.format.digests import chunk_checksum
from h5traces.format.limits import Scratch
from h5traces.storage.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from h5traces.storage.files import ByteFile
    from h5traces.storage.publish import LatchedFile

# Small enough to stay in a core's cache between reading and hashing.
SPAN_NBYTES: Final = 1 << 20
# Spans of one task of a thread: starting a task takes as long as hashing 300 kB.
_SPANS_PER_TASK: Final = 16
_TASKS_WAITING: Final = 32
_PLACES_AT_A_TIME: Final = 4096
_BETWEEN: Final = -1
# For the span that a thread reads.
_SPAN: Final = Scratch()
_BLOCK_NBYTES: Final = 1 << 20


def metadata_checksum(
    file: ByteFile | LatchedFile, offsets: NDArray[np.int64], sizes: NDArray[np.int64], end: int
) -> int:
    """xxh3-64 of the bytes up to `end` that lie in no chunk, in the order of the file.

    With the checksums of the chunks, it covers every byte of the HDF5 part.
    """
    order = np.argsort(offsets, kind="stable")
    starts, stops = offsets[order], offsets[order] + sizes[order]
    state, position = xxhash.xxh3_64(), 0
    for start, stop in zip([*starts.tolist(), end], [*stops.tolist(), end], strict=True):
        while position < start:
            block = file.read_at(position, min(_BLOCK_NBYTES, start - position))
            state.update(block)
            position += len(block)
        position = max(position, stop)
    return state.intdigest()


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of comparing all bytes of a file with checksums."""

    # rows of the chunk table whose bytes do not fit their checksum, or lie outside, ascending
    damaged: list[int]
    # xxh3-64 of the bytes that lie in no chunk
    metadata_checksum: int


def scan(
    file: ByteFile,
    table: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]],
    end: int,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Compare all bytes up to `end` with checksums.

    `table` has offset, size and xxh3-64 of every chunk. `progress` is called with the bytes read
    and the bytes there are.
    """
    offsets, sizes, checksums = table
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= end) & (offsets <= end - sizes)
    damaged = np.flatnonzero(~inside).tolist()
    rows = np.flatnonzero(inside)
    rows = rows[np.argsort(offsets[rows], kind="stable")]
    between = xxhash.xxh3_64()
    spans = _spans(_places(rows, offsets, sizes), end)
    waiting: deque[tuple[int, Future[list[tuple[list[int], bytes]]]]] = deque()

    def check(task: list[_Span]) -> list[tuple[list[int], bytes]]:
        return [_check(file, span, checksums) for span in task]

    def take() -> None:
        stop, checked = waiting.popleft()
        for found, more in checked.result():
            damaged.extend(found)
            between.update(more)
        if progress is not None:
            progress(stop, end)

    with ThreadPool(workers) as pool:
        while task := list(islice(spans, _SPANS_PER_TASK)):
            waiting.append((task[-1].stop, pool.submit(check, task)))
            if len(waiting) > _TASKS_WAITING:
                take()
        while waiting:
            take()
    return Scan(sorted(damaged), between.intdigest())


def _places(
    rows: NDArray[np.int64], offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Iterator[tuple[int, int, int]]:
    """Row, offset and size of chunks; some thousand at a time, as Python's numbers are large."""
    for start in range(0, len(rows), _PLACES_AT_A_TIME):
        part = rows[start : start + _PLACES_AT_A_TIME]
        yield from zip(part.tolist(), offsets[part].tolist(), sizes[part].tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of the file."""

    start: int
    stop: int
    # in order: a row of the chunk table (or `_BETWEEN`), start and stop
    pieces: list[tuple[int, int, int]]


def _spans(places: Iterator[tuple[int, int, int]], end: int) -> Iterator[_Span]:
    """The file from its start to `end` in spans; a chunk is never cut."""
    pieces: list[tuple[int, int, int]] = []
    start = position = 0
    for row, offset, nbytes in chain(places, [(_BETWEEN, end, 0)]):
        while position < offset:
            stop = min(offset, position + SPAN_NBYTES)
            pieces.append((_BETWEEN, position, stop))
            position = stop
            if position - start >= SPAN_NBYTES:
                yield _Span(start, position, pieces)
                pieces, start = [], position
        if offset < start:
            # It begins in an earlier span, in damaged or handmade files only.
            yield _Span(offset, offset + nbytes, [(row, offset, offset + nbytes)])
            continue
        pieces.append((row, offset, offset + nbytes))
        position = max(position, offset + nbytes)
        if position - start >= SPAN_NBYTES:
            yield _Span(start, position, pieces)
            pieces, start = [], position
    if pieces:
        yield _Span(start, position, pieces)


def _check(file: ByteFile, span: _Span, checksums: NDArray[np.uint64]) -> tuple[list[int], bytes]:
    """Rows of a span that are damaged, and its bytes that lie in no chunk."""
    view = _SPAN.take(span.stop - span.start).data
    file.read_into(span.start, view)
    damaged, between = [], []
    for row, start, stop in span.pieces:
        piece = view[start - span.start : stop - span.start]
        if row == _BETWEEN:
            between.append(bytes(piece))
        elif chunk_checksum(piece) != int(checksums[row]):
            damaged.append(row)
    return damaged, b"".join(between)
