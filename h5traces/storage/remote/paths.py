"""Addresses of archives on servers, options of reading them, and what a transport must do."""

from __future__ import annotations

import posixpath
import random
import re
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from h5traces.arguments import checked_options
from h5traces.errors import RemoteError
from h5traces.format.text import short_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path


# At least two letters: a single one is a drive of Windows.
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.ASCII | re.IGNORECASE)
_WEB = ("http", "https")
_WEB_MAGIC = re.compile(r"[*\[]")
_MAGIC = re.compile(r"[*?\[]")
# Parts of a web address that may hold a password or a signature.
_SECRETS = re.compile(r"(?<=://)[^/@]*@|(?<=\?)[^#]+")
# seconds
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
Result = TypeVar("Result")


def is_url(source: object) -> bool:
    """Whether `source` is an address such as ``s3://bucket/run.h5``, and no path on disk."""
    if isinstance(source, RemotePath):
        return True
    return isinstance(source, str) and _URL.match(source) is not None


@dataclass(frozen=True, order=True, slots=True)
class RemotePath:
    """The address of an object, or of several: what a `Path` is to files.

    ``str()`` leaves out what may be secret (passwords, all after ``?``), so that messages can be
    shown; ``url`` is complete.

    Attributes
    ----------
    url
        ``s3://…``, ``hf://…``, ``https://…``, or of any other protocol that fsspec knows.
    """

    url: str

    @property
    def protocol(self) -> str:
        """``s3``, ``hf``, ``https`` and so on."""
        found = _URL.match(self.url)
        return found[1].lower() if found else ""

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server."""
        return self.protocol in _WEB

    @property
    def name(self) -> str:
        """The last part of the address, up to ``?``."""
        if self.is_web:
            return posixpath.basename(unquote(urlsplit(self.url).path))
        return posixpath.basename(self.url.partition("://")[2])

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def is_pattern(self) -> bool:
        """Whether it is a glob; ``?`` in a web address begins a query."""
        if self.is_web:
            return _WEB_MAGIC.search(self.url.partition("?")[0]) is not None
        return _MAGIC.search(self.url) is not None

    def __str__(self) -> str:
        return _SECRETS.sub("…", self.url) if self.is_web else self.url


@checked_options
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RemoteOptions:
    """Options for remote archives.

    Attributes
    ----------
    storage_options
        Handed to fsspec's file system of the protocol: ``key``, ``secret``, ``token``, ``anon``,
        ``endpoint_url`` for S3; ``headers``, ``client_kwargs`` for web servers; ``token`` for hf.
    cache
        Folder that keeps what was fetched; None for none.
    attempts
        How often a request is tried when it fails for a temporary reason.
    timeout
        Seconds to wait for a connection, and for each piece of an answer.
    total_timeout
        Seconds that one request may take in all, its answer included; the same for a listing.
    min_bytes_per_second
        An answer that comes more slowly, once `timeout` is over, is given up and asked for again.
    max_listed
        Objects that a listing of a folder or glob may have.
    max_listing_nbytes
        Bytes that one answer of a listing may have.
    tail_nbytes
        Bytes of the first request, from the end of the object: the index of most archives.
    max_gap_nbytes
        Ranges with no more than this between them are fetched in one request.
    max_request_nbytes
        Ranges are not joined beyond this: parallel requests are faster then.
    max_parallel
        Requests at a time for one read.
    """

    storage_options: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    attempts: int = 5
    timeout: float = 30.0
    total_timeout: float = 3600.0
    min_bytes_per_second: int = 4096
    max_listed: int = 100_000
    max_listing_nbytes: int = 16 << 20
    tail_nbytes: int = 128 << 10
    max_gap_nbytes: int = 256 << 10
    max_request_nbytes: int = 16 << 20
    max_parallel: int = 8

    __repr__ = short_repr


DEFAULT_REMOTE = RemoteOptions()


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to a request for a range."""

    data: bytes
    # of the whole object
    total_nbytes: int
    # what changes when the object does: its ETag, else its time; None if the server sends neither
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
    """Bytes of a file."""

    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        """Offset after the last byte."""
        return self.offset + self.nbytes


def coalesce(
    ranges: Iterable[ByteRange], *, max_gap_nbytes: int, max_nbytes: int
) -> list[ByteRange]:
    """Ranges, which may overlap, joined into few requests, in order.

    They are joined over gaps up to `max_gap_nbytes`, and to no more than `max_nbytes`, which a
    single range may exceed.
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

    `pieces` are the offset and bytes of each; ascending, and none lies in another.
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


def persistently(path: RemotePath, attempts: int, request: Callable[[], Result]) -> Result:
    """What `request` returns, at the latest the last time; pauses grow from 0.1 to 5 seconds."""
    for attempt in range(attempts):
        try:
            return request()
        except TemporaryError as error:
            if attempt + 1 == attempts:
                message = (
                    f"{path}: the server cannot be reached, or fails: {error} (tried {attempts} "
                    "times); check the address and the network"
                )
                raise RemoteError(message) from error
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
        # So that many readers that failed together do not come back together.
        time.sleep(pause * random.uniform(0.5, 1.0))
    message = f"{path}: attempts is {attempts}, expected at least 1"
    raise RemoteError(message)
