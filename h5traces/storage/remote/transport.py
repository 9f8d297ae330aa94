"""What a remote file asks of the library that talks to its server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from h5traces.storage.remote.ranges import ByteRange


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
        What changes when the object does: its ETag, else its time; None where the server names
        neither.
    """

    data: bytes
    total_nbytes: int
    version: str | None


class TemporaryError(Exception):
    """A request failed for a reason that may pass; never reaches users."""


class Transport(Protocol):
    """One object on its server. Safe for threads.

    Every method raises FileNotFoundError where there is no such object, RemoteError where the
    server refuses, and `TemporaryError` where it makes sense to try again.
    """

    def tail(self, nbytes: int) -> Reply:
        """The last bytes of the object, or all of it where it is smaller."""

    def get(self, wanted: ByteRange) -> Reply:
        """A range that lies in the object."""
