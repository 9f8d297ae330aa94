"""Samples in one call: read in threads, and fetched from servers in few requests."""

from __future__ import annotations

import contextlib
from itertools import groupby
from typing import TYPE_CHECKING, Any

from h5traces.archive.stored_sample import begin
from h5traces.storage.plans import NothingRead
from h5traces.storage.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from h5traces.archive.file import ArchiveFile
    from h5traces.archive.trace import LayerSequence
    from h5traces.storage.plans import Reading

    # The arrays of one sample, by kind.
    Sample = dict[str, LayerSequence]

# Stored bytes of samples on servers that one call holds at a time.
_WINDOW_NBYTES = 128 << 20
MOST_FETCHED_NBYTES = 256 << 20
# Shards on servers that are opened or read at a time; each may make several requests.
FILES_AT_A_TIME = 8


def stored_nbytes(sequence: LayerSequence) -> int:
    """Bytes that reading all arrays of a sequence fetches."""
    return sum(size for _, size in _ranges(sequence))


def _ranges(sequence: LayerSequence) -> list[tuple[int, int]]:
    return [each for path in sequence._paths for each in sequence._trace.ranges(path)]


def _windows(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Parts whose stored bytes fit into memory together; local files make one part."""
    part: list[Sample] = []
    nbytes = 0
    for sample in samples:
        part.append(sample)
        nbytes += sum(stored_nbytes(each) for each in sample.values() if each._trace.is_remote)
        if nbytes >= _WINDOW_NBYTES:
            yield part
            part, nbytes = [], 0
    yield part


def fetch(wanted: Iterable[LayerSequence], until_closed: contextlib.ExitStack) -> None:
    """Fetch the arrays that lie on servers, of all shards at a time."""
    ranges: dict[ArchiveFile, list[tuple[int, int]]] = {}
    samples: dict[ArchiveFile, list[int]] = {}
    for sequence in wanted:
        if sequence._trace.is_remote:
            file = sequence._trace.file
            ranges.setdefault(file, []).extend(_ranges(sequence))
            samples.setdefault(file, []).append(sequence._trace.index)
    if not ranges:
        return
    with ThreadPool(min(FILES_AT_A_TIME, len(ranges))) as pool:
        fetching = [
            pool.submit(until_closed.enter_context, file.prefetched(parts, samples[file]))
            for file, parts in ranges.items()
        ]
    for each in fetching:
        each.result()


def read_samples(samples: list[Sample], workers: int) -> list[dict[str, list[Any]]]:
    """All arrays of some samples; threads go on with the next while one becomes arrays."""
    found = []
    for window in _windows(samples):
        with contextlib.ExitStack() as fetched:
            fetch((each for sample in window for each in sample.values()), fetched)
            # Neighbours in one file are read in one call.
            groups = [list(group) for _, group in groupby(window, _file_of)]
            readings = [_begin(group, workers) for group in groups]
            for group, reading in zip(groups, readings, strict=True):
                found += [_arrays(each, reading, place) for place, each in enumerate(group)]
    return found


def _file_of(sample: Sample) -> ArchiveFile | None:
    return next((each._trace.file for each in sample.values()), None)


def _begin(samples: list[Sample], workers: int) -> Reading:
    wanted = [
        (sequences[0]._trace, [path for each in sequences for path in each._paths])
        for sequences in (list(sample.values()) for sample in samples)
        if sequences
    ]
    return begin(wanted, workers) if wanted else NothingRead()


def _arrays(sample: Sample, reading: Reading, place: int) -> dict[str, list[Any]]:
    with contextlib.ExitStack() as at_hand:
        for sequence in list(sample.values())[:1]:
            at_hand.enter_context(sequence._trace.at_hand(reading.arrays(place)))
        return {kind: sequence._read_all() for kind, sequence in sample.items()}
