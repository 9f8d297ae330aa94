"""Many arrays in one call: read in threads, and fetched from servers in few requests."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from h5traces.archive.file import ArchiveFile
    from h5traces.archive.trace import LayerSequence

# Enough that no thread waits long for the last one.
_TASKS_PER_WORKER = 4
# Stored bytes of arrays on servers that one call holds at a time.
_WINDOW_NBYTES = 128 << 20
MOST_FETCHED_NBYTES = 256 << 20
# Shards on servers that are opened or read at a time; each may make several requests.
FILES_AT_A_TIME = 8


def windows(
    wanted: list[tuple[LayerSequence, int]],
) -> Iterator[list[tuple[LayerSequence, int]]]:
    """Parts whose stored bytes may lie in memory at a time; local files need no more than one."""
    if not any(sequence._trace.is_remote for sequence, _ in wanted):
        yield wanted
        return
    part: list[tuple[LayerSequence, int]] = []
    nbytes = 0
    for sequence, position in wanted:
        part.append((sequence, position))
        nbytes += sum(size for _, size in sequence._ranges(position))
        if nbytes >= _WINDOW_NBYTES:
            yield part
            part, nbytes = [], 0
    yield part


def fetch(wanted: list[tuple[LayerSequence, int]], until_closed: contextlib.ExitStack) -> None:
    """Fetch the arrays that lie on servers, of all shards at a time."""
    ranges: dict[ArchiveFile, list[tuple[int, int]]] = {}
    samples: dict[ArchiveFile, list[int]] = {}
    for sequence, position in wanted:
        if sequence._trace.is_remote:
            file = sequence._trace.file
            ranges.setdefault(file, []).extend(sequence._ranges(position))
            samples.setdefault(file, []).append(sequence._trace.index)
    if not ranges:
        return
    with ThreadPoolExecutor(min(FILES_AT_A_TIME, len(ranges))) as pool:
        fetching = [
            pool.submit(until_closed.enter_context, file.prefetched(parts, samples[file]))
            for file, parts in ranges.items()
        ]
    for each in fetching:
        each.result()


def read_all(wanted: list[tuple[LayerSequence, int]], workers: int) -> list[Any]:
    """Arrays by sequence and position, in order; a few large tasks, since small ones cost more."""

    def read(part: list[tuple[LayerSequence, int]]) -> list[Any]:
        return [sequence[position] for sequence, position in part]

    if workers == 1:
        return read(wanted)
    size = max(1, math.ceil(len(wanted) / (_TASKS_PER_WORKER * workers)))
    parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    with ThreadPoolExecutor(workers) as pool:
        return [array for part in pool.map(read, parts) for array in part]
