"""Files as read-only memory maps: arrays are views of them, and pages are given back in time."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.errors import ConversionError
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Pages that may stay in this process's memory until the next sample is read.
_RELEASE_NBYTES: Final = 32 << 20
# Linux maps this much around every page that is read.
_AROUND_NBYTES: Final = 64 << 10


class MappedFile:
    """A file in memory as a map.

    Where it was compressed, `content` is what it holds, or `descriptor` that of a file that does.

    Arrays of it are read-only views, which stay valid after `close`, also if the file is deleted.
    The file must not shrink while they are in use.

    Attributes
    ----------
    nbytes
        Size of the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        content: bytes | bytearray | None = None,
        descriptor: int | None = None,
        *,
        links: bool = True,
    ) -> None:
        self.path = Path(path)
        self._touched = 0
        if content is not None:
            self._map: Any = content
            self.nbytes = len(content)
            return
        if descriptor is None:
            descriptor = open_regular(self.path, ConversionError, links=links)
        else:
            descriptor = os.dup(descriptor)
        try:
            self.nbytes = os.fstat(descriptor).st_size
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if self.nbytes else None
        finally:
            os.close(descriptor)

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """At most `nbytes` from `offset`, a copy."""
        if self._map is None:
            return b""
        data = bytes(self._map[offset : offset + nbytes])
        self.release(nbytes + _AROUND_NBYTES)
        return data

    def view(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the file, which must hold them: a view ``(nbytes,)`` of uint8."""
        if not nbytes or self._map is None:
            return np.empty(0, np.uint8)
        self._touched += nbytes
        return np.frombuffer(self._map, np.uint8, nbytes, offset)

    def array(self, offset: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array that lies in the file, which must hold it: a view, also if not aligned."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return np.ndarray(shape, dtype, buffer=self.view(offset, nbytes))

    def release(self, nbytes: int = 0) -> None:
        """Give back the pages of what was read; views read them again if they are still used.

        Otherwise all that was ever read would count as this process's memory. `nbytes` were read
        beside what was asked of this file: of views that were there before.
        """
        self._touched += nbytes
        if self._touched >= _RELEASE_NBYTES and isinstance(self._map, mmap.mmap):
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def close(self) -> None:
        """Let go of the map: it ends with the last of its views."""
        self._map = None


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The array, copied if its numbers are not aligned, which makes them slow or unusable."""
    return array if array.flags.aligned else array.copy(order="K")
