"""From addresses to transports; the libraries for them are imported when one is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h5traces.errors import MissingDependencyError

if TYPE_CHECKING:
    from h5traces.storage.remote.options import RemoteOptions
    from h5traces.storage.remote.paths import RemotePath
    from h5traces.storage.remote.transport import Transport


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
