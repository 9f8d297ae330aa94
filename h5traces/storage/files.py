"""Random access to the bytes of an archive."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from h5traces.errors import CorruptArchiveError, H5TracesError, NotAnArchiveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


class ByteFile(Protocol):
    """Bytes that can be read at any offset by many threads at once."""

    @property
    def name(self) -> str:
        """Path or address, for messages."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` from `offset`; CorruptArchiveError where the file ends before."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`; CorruptArchiveError as `read_at`."""

    def at_hand(self, offset: int, nbytes: int) -> bool:
        """Whether these bytes can be read without a request to a server."""

    def hold(self, offset: int, nbytes: int) -> None:
        """Fetch bytes at once, since they will be read in pieces."""

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Fetch these (offset, nbytes) together for reads inside the block."""

    def close(self) -> None:
        """Close what is open; the next read opens it again."""


def open_regular(
    path: Path,
    error: type[H5TracesError] = NotAnArchiveError,
    expected: str = "an archive or a batch on disk",
    *,
    links: bool = True,
) -> int:
    """A descriptor of a file, open for reading; `error` is raised for a pipe, device or socket.

    With `links` false, also for a symbolic link.
    """
    # Opening a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as failure:
        if failure.errno == errno.ELOOP and not links:
            message = f"{path}: is a symbolic link; expected {expected}"
        elif failure.errno == errno.ENXIO:
            message = f"{path}: is not a regular file; expected {expected}"
        else:
            raise
        raise error(message) from failure
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        message = f"{path}: is not a regular file; expected {expected}"
        raise error(message)
    return descriptor


# Far more than any such document has.
_MOST_DOCUMENT_NBYTES: Final = 64 << 20


def read_document(
    path: Path,
    error: type[H5TracesError],
    expected: str = "a document",
    *,
    max_nbytes: int = _MOST_DOCUMENT_NBYTES,
) -> bytes:
    """All of a small regular file; `error` for a pipe, a device, or what is larger.

    Opening the first could wait forever, and the last may have no end.
    """
    with os.fdopen(open_regular(path, error, expected), "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        is_small = nbytes <= max_nbytes
        # Reading allocates what is asked for, so no more than the file has is.
        data = file.read(nbytes + 1) if is_small else b""
        if len(data) > nbytes:  # the file grows
            data += file.read(max_nbytes)
    if not is_small or len(data) > max_nbytes:
        message = f"{path}: has more than {max_nbytes:,} bytes; expected {expected}"
        raise error(message)
    return data


class LocalFile:
    """A `ByteFile` on disk, read without a shared position: safe for threads and after ``fork``.

    A closed file opens again for every read, if it still is the same file, so that few files are
    open.
    """

    # For `__del__` where opening failed.
    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._begin()
        with self.descriptor():
            pass

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._num_readers = 0
        self._is_closed = False

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode, which tell whether a name still stands for this file."""
        return self._identity

    @property
    def nbytes(self) -> int:
        with self.descriptor() as descriptor:
            return os.fstat(descriptor).st_size

    def read_at(self, offset: int, nbytes: int) -> bytes:
        with self.descriptor() as descriptor:
            data = os.pread(descriptor, nbytes, offset)
            while len(data) < nbytes:
                more = os.pread(descriptor, nbytes - len(data), offset + len(data))
                if not more:
                    raise self._too_short(descriptor, offset, nbytes)
                data += more
        return data

    def read_into(self, offset: int, out: memoryview) -> None:
        with self.descriptor() as descriptor:
            done = 0
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], offset + done)
                if not count:
                    raise self._too_short(descriptor, offset, len(out))
                done += count

    def _too_short(self, descriptor: int, offset: int, nbytes: int) -> CorruptArchiveError:
        return CorruptArchiveError(
            f"{self.path}: the file ends at {os.fstat(descriptor).st_size}, expected {nbytes} "
            f"bytes at {offset}; it was truncated"
        )

    def at_hand(self, offset: int, nbytes: int) -> bool:
        return True

    def hold(self, offset: int, nbytes: int) -> None:
        """Do nothing: the system's page cache does that."""

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, which stays open inside the block even if the file is closed."""
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = self._open()
            self._num_readers += 1
        try:
            yield self._descriptor
        finally:
            with self._lock:
                self._num_readers -= 1
                if self._is_closed and not self._num_readers:
                    self._close_now()

    def _open(self) -> int:
        descriptor = open_regular(self.path)
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        if self._identity not in (None, identity):
            os.close(descriptor)
            message = f"{self.path}: the file was replaced since it was opened; open it again"
            raise CorruptArchiveError(message)
        self._identity = identity
        return descriptor

    def close(self) -> None:
        """Close the descriptor as soon as no thread reads."""
        with self._lock:
            self._is_closed = True
            if not self._num_readers:
                self._close_now()

    def _close_now(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self._close_now()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_identity": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
