"""Forges what HDF5 object headers say, with the checksum that HDF5 expects."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MASK = 0xFFFFFFFF
_REFERENCE_COUNT, _CONTINUATION = 0x16, 0x10


def _rotated(value: int, by: int) -> int:
    return (value << by | value >> (32 - by)) & _MASK


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash, which HDF5 checks its metadata with."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    position = 0
    while len(data) - position > 12:
        x, y, z = struct.unpack_from("<III", data, position)
        a, b, c = (a + x) & _MASK, (b + y) & _MASK, (c + z) & _MASK
        for shifts in ((4, 6, 8), (16, 19, 4)):
            for shift in shifts:
                a, b, c = ((a - c) & _MASK) ^ _rotated(c, shift), b, (c + b) & _MASK
                a, b, c = b, c, a
        position += 12
    tail = data[position:]
    if not tail:
        return c
    x, y, z = struct.unpack("<III", tail.ljust(12, b"\0"))
    a, b, c = (a + x) & _MASK, (b + y) & _MASK, (c + z) & _MASK
    for shift in (14, 11, 25, 16, 4, 14, 24):
        # c ^= b, c -= rot(b); then the same for the next of the three
        c = ((c ^ b) - _rotated(b, shift)) & _MASK
        a, b, c = b, c, a
    return b


def set_reference_count(path: Path, address: int, count: int) -> None:
    """Let the object at `address` claim so many links to it."""
    data = bytearray(path.read_bytes())
    assert data[address : address + 4] == b"OHDR"
    flags = data[address + 5]
    start = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = int.from_bytes(data[start : start + width], "little")
    chunks = [(address, start + width, start + width + size)]
    header = 6 if flags & 4 else 4
    changed = False
    while chunks:
        begin, position, end = chunks.pop()
        while position + header <= end:
            kind, nbytes = struct.unpack_from("<BH", data, position)
            body = position + header
            if kind == _CONTINUATION:
                where, length = struct.unpack_from("<QQ", data, body)
                chunks.append((where, where + 4, where + length - 4))
            if kind == _REFERENCE_COUNT:
                struct.pack_into("<I", data, body + 1, count)
                struct.pack_into("<I", data, end, lookup3(bytes(data[begin:end])))
                changed = True
            position = body + nbytes
    assert changed
    path.write_bytes(data)
