"""Random access to the bytes of an archive."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Protocol

from h5traces.errors import CorruptArchiveError

if TYPE_CHECKING:
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


class LocalFile:
    """A file on disk, read without a shared position: safe for threads and after ``fork``.

    Raises
    ------
    OSError
        The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def nbytes(self) -> int:
        """Size of the file now."""
        return os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` from `offset`.

        Raises
        ------
        CorruptArchiveError
            The file ends before.
        """
        data = os.pread(self._descriptor, nbytes, offset)
        while len(data) < nbytes:
            more = os.pread(self._descriptor, nbytes - len(data), offset + len(data))
            if not more:
                message = (
                    f"{self.path}: the file ends at {self.nbytes}, expected {nbytes} bytes at "
                    f"{offset}; it was truncated"
                )
                raise CorruptArchiveError(message)
            data += more
        return data

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
