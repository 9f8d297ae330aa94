"""Requests for ranges: what a remote file needs of a server, joining, and trying again."""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from h5traces.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from h5traces.storage.remote.paths import RemotePath


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to a request for a range.

    Attributes
    ----------
    data
        The bytes.
    total_nbytes
        Size of the whole object.
    version
        What changes when the object does: its ETag, else its time; None if the server sends
        neither.
    """

    data: bytes
    total_nbytes: int
    version: str | None


class TemporaryError(Exception):
    """A request failed for a reason that may pass; users never see it."""


class Transport(Protocol):
    """One object on its server. Safe for threads.

    Every method raises FileNotFoundError if there is no such object, RemoteError if the server
    rejects the request, and `TemporaryError` if trying again makes sense.
    """

    def tail(self, nbytes: int) -> Reply:
        """The last bytes of the object, or all of it where it is smaller."""

    def get(self, wanted: ByteRange) -> Reply:
        """A range that lies in the object."""


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
        """Offset after the last byte."""
        return self.offset + self.nbytes


def coalesce(
    ranges: Iterable[ByteRange], *, max_gap_nbytes: int, max_nbytes: int
) -> list[ByteRange]:
    """Ranges joined into few requests, in order.

    Parameters
    ----------
    ranges
        Ranges to read, in any order; they may overlap.
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


Result = TypeVar("Result")

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


def persistently(path: RemotePath, attempts: int, request: Callable[[], Result]) -> Result:
    """What `request` returns, at the latest the last time; pauses grow from 0.1 to 5 seconds."""
    for attempt in range(attempts):
        try:
            return request()
        except TemporaryError as error:
            if attempt + 1 == attempts:
                message = f"{path}: the server cannot be reached, or fails: {error} "
                msg = f"{message}(tried {attempts} times); check the address and the network"
                raise RemoteError(msg) from error
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
        # So that many readers that failed together do not come back together.
        time.sleep(pause * random.uniform(0.5, 1.0))
    message = f"{path}: attempts is {attempts}, expected at least 1"
    raise RemoteError(message)
