"""Checks the heaps of HDF5 that hold text of variable length before the library reads them.

The library goes from object to object by the sizes that a heap states, and never ends where one is
0 (HDF5 2.0). HDF5 File Format Specification 4.0, section III.E, global heap.
"""

from __future__ import annotations

import mmap
import os
import struct
from functools import cached_property
from typing import TYPE_CHECKING, Final

from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

    import h5py

# Signature, version 1 and three zeros.
_BEGIN: Final = b"GCOL\1\0\0\0"
_SIZE: Final = struct.Struct("<Q")
# Index, references, reserved, size.
_OBJECT: Final = struct.Struct("<HH4xQ")
_ALIGNMENT: Final = 8


class Heaps:
    """The heaps of a file, looked at once and only if needed."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._path = path
        self._sizes = file.id.get_create_plist().get_sizes()

    @cached_property
    def problem(self) -> str | None:
        """Why texts of variable length cannot be read; None if they can."""
        if self._sizes != (8, 8):
            return f"texts are stored with addresses and sizes of {self._sizes} bytes, expected 8"
        file = os.fdopen(open_regular(self._path), "rb")
        with file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = data.find(_BEGIN)
            while place >= 0:
                if not _is_sound(data, place):
                    return f"the heap of texts at byte {place:,} is damaged"
                place = data.find(_BEGIN, place + 1)
        return None


def _is_sound(data: mmap.mmap, begin: int) -> bool:
    at = begin + len(_BEGIN)
    if at + _SIZE.size > len(data):
        return False
    end = begin + _SIZE.unpack_from(data, at)[0]
    at += _SIZE.size
    if not at <= end <= len(data):
        return False
    while end - at >= _OBJECT.size:
        index, _, nbytes = _OBJECT.unpack_from(data, at)
        # Free space, of index 0, counts its own header.
        step = nbytes if index == 0 else _OBJECT.size + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if step < _OBJECT.size or step > end - at:
            return False
        at += step
    return True
