"""Byte ranges: which are fetched together, and what was fetched."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ByteRange(NamedTuple):
    """Bytes of a file.

    Attributes
    ----------
    offset, nbytes
        Where they begin, and how many there are.
    """

    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        """Offset behind the last byte."""
        return self.offset + self.nbytes


def coalesce(
    ranges: Iterable[ByteRange], *, max_gap_nbytes: int, max_nbytes: int
) -> list[ByteRange]:
    """Ranges joined to as few requests as pay, in order; none overlaps another by its start.

    Parameters
    ----------
    ranges
        What is wanted; in any order, may overlap.
    max_gap_nbytes
        Ranges are joined over gaps up to this.
    max_nbytes
        A joined range is not larger than this; a single one may be.
    """
    joined: list[ByteRange] = []
    for each in sorted(set(ranges)):
        if joined:
            last = joined[-1]
            stop = max(last.stop, each.stop)
            near = each.offset - last.stop <= max_gap_nbytes
            if each.stop <= last.stop or (near and stop - last.offset <= max_nbytes):
                joined[-1] = ByteRange(last.offset, stop - last.offset)
                continue
        joined.append(each)
    return joined


class Blocks:
    """Pieces of a file in memory, found by the ranges that lie in them.

    Parameters
    ----------
    pieces
        Offset and bytes of each; ascending, and none lies in another.
    """

    def __init__(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        self._starts = [start for start, _ in pieces]
        self._data = [data for _, data in pieces]

    def find(self, wanted: ByteRange) -> bytes | None:
        """The bytes of a range that one piece holds, else None."""
        number = bisect_right(self._starts, wanted.offset) - 1
        if number < 0:
            return None
        first = wanted.offset - self._starts[number]
        data = self._data[number]
        if first + wanted.nbytes > len(data):
            return None
        return data[first : first + wanted.nbytes]
