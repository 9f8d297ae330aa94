"""One pass over the bytes of a file: checksums of its chunks, and of all that lies between them.

The file is read in spans of a few chunks, in the order of their places, so that it takes little
more than hashing it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from h5traces.format.digests import chunk_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from h5traces.storage.files import ByteFile

# Stays in a core's cache between reading and hashing.
SPAN_NBYTES: Final = 1 << 20
# That a thread checks one after the other: handing work over takes as long as hashing 300 kB.
_SPANS_PER_TASK: Final = 16
_BETWEEN: Final = -1


@dataclass(frozen=True, slots=True)
class Scan:
    """What a pass over a file found.

    Attributes
    ----------
    damaged
        Rows of the chunk table whose bytes do not fit their checksum, or lie outside, ascending.
    metadata_checksum
        xxh3-64 of the bytes that lie in no chunk.
    """

    damaged: list[int]
    metadata_checksum: int


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of the file.

    Attributes
    ----------
    start, stop
        Where it lies.
    pieces
        What it consists of, in order: a row of the chunk table (or `_BETWEEN`), start and stop.
    """

    start: int
    stop: int
    pieces: list[tuple[int, int, int]]


def scan(
    file: ByteFile,
    table: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]],
    end: int,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Compare all bytes up to `end` with checksums.

    Parameters
    ----------
    file
        The file.
    table
        Offset, size and xxh3-64 of every chunk.
    end
        Where the chunks and what lies between them end.
    workers
        Threads; one per core by default.
    progress
        Called with the bytes read and the bytes there are.

    Raises
    ------
    CorruptArchiveError
        The file ends before `end`.
    """
    offsets, sizes, checksums = table
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= end) & (offsets <= end - sizes)
    damaged = np.flatnonzero(~inside).tolist()
    rows = np.flatnonzero(inside)
    rows = rows[np.argsort(offsets[rows], kind="stable")]
    places = zip(rows.tolist(), offsets[rows].tolist(), sizes[rows].tolist(), strict=True)
    between = xxhash.xxh3_64()
    buffers = _Buffers()

    spans = list(_spans(places, end))
    starts = range(0, len(spans), _SPANS_PER_TASK)

    def check(start: int) -> list[tuple[list[int], bytes]]:
        task = spans[start : start + _SPANS_PER_TASK]
        return [_check(file, span, checksums, buffers) for span in task]

    with ThreadPoolExecutor(workers) as pool:
        for start, results in zip(starts, pool.map(check, starts), strict=True):
            for found, more in results:
                damaged += found
                between.update(more)
            if progress is not None:
                progress(spans[: start + _SPANS_PER_TASK][-1].stop, end)
    return Scan(sorted(damaged), between.intdigest())


class _Buffers(threading.local):
    """A buffer for every thread, which grows to the largest span."""

    def __init__(self) -> None:
        self._buffer = bytearray(2 * SPAN_NBYTES)

    def get(self, nbytes: int) -> memoryview:
        if nbytes > len(self._buffer):
            self._buffer = bytearray(nbytes)
        return memoryview(self._buffer)[:nbytes]


def _check(
    file: ByteFile, span: _Span, checksums: NDArray[np.uint64], buffers: _Buffers
) -> tuple[list[int], bytes]:
    """Rows of a span that are damaged, and its bytes that lie in no chunk."""
    view = buffers.get(span.stop - span.start)
    file.read_into(span.start, view)
    damaged, between = [], []
    for row, start, stop in span.pieces:
        piece = view[start - span.start : stop - span.start]
        if row == _BETWEEN:
            between.append(bytes(piece))
        elif chunk_checksum(piece) != int(checksums[row]):
            damaged.append(row)
    return damaged, b"".join(between)


def _spans(places: Iterator[tuple[int, int, int]], end: int) -> Iterator[_Span]:
    """The file from its start to `end` in spans; a chunk is never cut."""
    pieces: list[tuple[int, int, int]] = []
    start = position = 0
    for row, offset, nbytes in (*places, (_BETWEEN, end, 0)):
        while position < offset:
            stop = min(offset, position + SPAN_NBYTES)
            pieces.append((_BETWEEN, position, stop))
            position = stop
            if position - start >= SPAN_NBYTES:
                yield _Span(start, position, pieces)
                pieces, start = [], position
        if offset < start:
            # It begins in an earlier span: only in files that are damaged, or made by hand.
            yield _Span(offset, offset + nbytes, [(row, offset, offset + nbytes)])
            continue
        pieces.append((row, offset, offset + nbytes))
        position = max(position, offset + nbytes)
        if position - start >= SPAN_NBYTES:
            yield _Span(start, position, pieces)
            pieces, start = [], position
    if pieces:
        yield _Span(start, position, pieces)
