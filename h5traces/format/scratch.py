"""Memory for what is needed only until a call returns, kept for the next one.

Fresh memory costs a page fault for every 4 KiB, and freed blocks of some 100 KiB go back to the
system at once: a chunk that is read, inflated and unshuffled through fresh buffers spends a third
of its time there.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Every chunk that h5traces writes fits; larger ones of other writers are not worth keeping
# memory for.
_MOST_KEPT_NBYTES: Final = 5 << 20


class Scratch(threading.local):
    """One buffer for each thread; what it held is lost when it is asked for again."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """`nbytes` of uninitialised memory, to be let go of before the next call."""
        if nbytes > self._buffer.size:
            buffer = np.empty(nbytes, np.uint8)
            if nbytes > _MOST_KEPT_NBYTES:
                return buffer
            self._buffer = buffer
        return self._buffer[:nbytes]
