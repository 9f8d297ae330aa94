"""What a remote file asks of the library that talks to its server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from h5traces.errors import MissingDependencyError

if TYPE_CHECKING:
    from h5traces.storage.remote.options import RemoteOptions
    from h5traces.storage.remote.paths import RemotePath
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


def open_transport(path: RemotePath, options: RemoteOptions) -> Transport:
    """The transport for an address in this process.

    Raises
    ------
    MissingDependencyError
        fsspec, or the library for the protocol, is not installed.
    RemoteError
        fsspec knows no such protocol.
    """
    try:
        from h5traces.storage.remote.filesystems import transport_for

        return transport_for(path, options)
    except ImportError as error:
        raise missing(path, error) from error


def list_remote(
    path: RemotePath, suffixes: tuple[str, ...], options: RemoteOptions
) -> list[RemotePath]:
    """The objects that a pattern matches, or that lie below a folder, sorted.

    Raises
    ------
    MissingDependencyError, RemoteError, FileNotFoundError
        As `open_transport`; or the server refuses, or cannot be reached.
    """
    try:
        from h5traces.storage.remote.filesystems import list_objects

        return list_objects(path, suffixes, options)
    except ImportError as error:
        raise missing(path, error) from error


def missing(path: RemotePath, error: ImportError) -> MissingDependencyError:
    """The error for a library that is not installed."""
    return MissingDependencyError(
        f"{path}: reading {path.protocol}:// needs a library that is not installed ({error}); "
        "install h5traces[remote]"
    )
