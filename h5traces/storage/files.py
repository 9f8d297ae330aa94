"""Random access to the bytes of an archive."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Protocol

from h5traces.errors import CorruptArchiveError

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
        """Whether these bytes can be read without asking a server."""

    def hold(self, offset: int, nbytes: int) -> None:
        """Bytes at the end of the file will be read piece by piece: fetch them at once."""

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Inside the block these (offset, nbytes) will be read: fetch them together."""

    def close(self) -> None:
        """Let go of what is open; the next read opens it again."""


class LocalFile:
    """A file on disk, read without a shared position: safe for threads and after ``fork``.

    A closed file opens again for every read, if it still is the same file: whoever closed it wants
    few files open.

    Raises
    ------
    OSError
        The file cannot be opened.
    """

    # Before a file is open, `__del__` finds this one.
    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._begin()
        with self._used():
            pass

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._num_readers = 0
        self._is_closed = False

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def nbytes(self) -> int:
        """Size of the file now."""
        with self._used() as descriptor:
            return os.fstat(descriptor).st_size

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` from `offset`.

        Raises
        ------
        CorruptArchiveError
            The file ends before, or was replaced while it was closed.
        """
        with self._used() as descriptor:
            data = os.pread(descriptor, nbytes, offset)
            while len(data) < nbytes:
                more = os.pread(descriptor, nbytes - len(data), offset + len(data))
                if not more:
                    raise self._too_short(descriptor, offset, nbytes)
                data += more
        return data

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset`.

        Raises
        ------
        CorruptArchiveError
            As `read_at`.
        """
        with self._used() as descriptor:
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
        """True: nothing of a local file is far away."""
        del offset, nbytes
        return True

    def hold(self, offset: int, nbytes: int) -> None:
        """Nothing: the system's page cache does that."""

    def prefetched(self, ranges: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """Nothing: reads of a local file are cheap."""
        del ranges
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _used(self) -> Iterator[int]:
        """The descriptor; it stays open inside the block, whoever closes the file meanwhile."""
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
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        if self._identity not in (None, identity):
            os.close(descriptor)
            message = f"{self.path}: the file was replaced since it was opened; open it again"
            raise CorruptArchiveError(message)
        self._identity = identity
        return descriptor

    def close(self) -> None:
        """Close the descriptor as soon as nobody reads."""
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
