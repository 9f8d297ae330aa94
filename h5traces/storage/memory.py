"""Memory for arrays that are read, used again where it was let go.

The system clears every page of new memory when it is first touched, which takes half as long as
inflating into it. So up to `_MOST_KEPT` bytes that nobody uses any more wait for the next arrays.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Some samples of Llama-2-7B, as many as one call of a reader returns.
_MOST_KEPT: Final = 96 << 20
# Smaller memory is kept by the allocator.
_LEAST_NBYTES: Final = 128 << 10
# Of a block that glibc learns from, less what it adds.
_LARGEST_NBYTES: Final = (32 << 20) - (64 << 10)
# Sizes of blocks differ by an eighth or less, so that one fits arrays of about the same size.
_STEPS: Final = 8


class Pool:
    """Blocks of memory that wait for their next use, at most `most_kept` bytes of them."""

    def __init__(self, most_kept: int = _MOST_KEPT) -> None:
        self._most_kept = most_kept
        # Arrays may be let go at any time, also while this thread holds the lock.
        self._lock = threading.RLock()
        self._blocks: dict[int, list[mmap.mmap]] = {}
        self.kept = 0

    def array(self, nbytes: int) -> NDArray[np.uint8]:
        """Uninitialised bytes, whose memory comes back once no array refers to it."""
        if nbytes < _LEAST_NBYTES:
            return np.empty(nbytes, np.uint8)
        step = max(mmap.PAGESIZE, (1 << nbytes.bit_length()) // (2 * _STEPS))
        size = -(-nbytes // step) * step
        block = self._taken(size) or _new_block(size)
        array = np.frombuffer(block, np.uint8, nbytes)
        weakref.finalize(array, self._give, block, os.getpid()).atexit = False
        return array

    def _taken(self, size: int) -> mmap.mmap | None:
        with self._lock:
            found = self._blocks.get(size)
            if not found:
                return None
            self.kept -= size
            return found.pop()

    def _give(self, block: mmap.mmap, process: int) -> None:
        size = len(block)
        # After a fork, pages would be copied when they are touched: no faster than new ones.
        if process == os.getpid() and self.kept + size <= self._most_kept:
            with self._lock:
                self.kept += size
                self._blocks.setdefault(size, []).append(block)


def _new_block(size: int) -> mmap.mmap:
    # Private: shared memory would stay the same in a process that was forked.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Pages of 2 MiB are cleared in a third of the time.
    with contextlib.suppress(AttributeError, OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


@cache
def keep_freed() -> None:
    """Have the C library keep more of the memory that is freed, for what is asked for next.

    At first, glibc gives pages back at once, and the system clears others for every array. It
    keeps up to twice the largest block that was ever freed, of 32 MiB at most. This one is never
    touched.
    """
    bytes(_LARGEST_NBYTES)


# Of this process.
POOL: Final = Pool()
