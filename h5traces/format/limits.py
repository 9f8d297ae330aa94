"""Limits on what an archive may ask of its reader, and memory that is kept from call to call."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from h5traces.arguments import checked_options
from h5traces.format.text import short_repr

if TYPE_CHECKING:
    from numpy.typing import NDArray


@checked_options
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ReadLimits:
    """Upper bounds; the defaults are generous for real archives.

    Attributes
    ----------
    max_attributes
        Attributes of one object.
    max_attribute_nbytes
        Bytes of one attribute, and of all attributes of an object that HDF5 keeps in a heap.
    max_chunk_nbytes
        Raw bytes of one chunk.
    max_array_nbytes
        Raw bytes of one dataset.
    max_depth
        Levels of groups below a sample.
    max_objects
        Groups and datasets in one sample.
    max_samples
        Samples in one archive.
    max_kinds
        Groups below ``/kinds``, and objects in the root.
    search_plugins
        Whether HDF5 may look for filter plugins on disk (1) while it reads; no archive needs it.
    """

    max_attributes: int = 1000
    max_attribute_nbytes: int = 16 << 20
    max_chunk_nbytes: int = 256 << 20
    max_array_nbytes: int = 64 << 30
    max_depth: int = 64
    max_objects: int = 20_000
    max_samples: int = 50_000_000
    max_kinds: int = 1000
    search_plugins: bool = False

    __repr__ = short_repr


DEFAULT_LIMITS = ReadLimits()


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
