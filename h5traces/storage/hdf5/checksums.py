"""The checksum of HDF5's metadata: Bob Jenkins' lookup3 (hashlittle, 2006), as HDF5 uses it.

One block of bytes is hashed as Python integers, 1.5 µs for 12 bytes; many of one length, such as
the headers of the layers of a sample, together as uint32 arrays, at a third of that.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

_START: Final = 0xDEADBEEF
_MASK: Final = 0xFFFFFFFF
_BLOCK_NBYTES: Final = 12
_ROTATIONS: Final = (4, 6, 8, 16, 19, 4)
# From so many equal lengths on, arrays are faster than integers.
_MIN_ALIKE: Final = 6


def checksums(blocks: Sequence[bytes]) -> list[int]:
    """The checksums of several blocks of bytes."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, block in enumerate(blocks):
        by_length[len(block)].append(number)
    found = [0] * len(blocks)
    for length, numbers in by_length.items():
        if len(numbers) < _MIN_ALIKE or not length:
            values = [checksum(blocks[number]) for number in numbers]
        else:
            values = _checksums_of_one_length([blocks[number] for number in numbers], length)
        for number, value in zip(numbers, values, strict=True):
            found[number] = value
    return found


def checksum(block: bytes) -> int:
    """The checksum of one block of bytes."""
    if not block:
        return _START
    padded = block + bytes(-len(block) % _BLOCK_NBYTES)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    return _hash(words, (_START + len(block)) & _MASK)


def _checksums_of_one_length(blocks: list[bytes], length: int) -> list[int]:
    padding = bytes(-length % _BLOCK_NBYTES)
    rows = np.frombuffer(padding.join([*blocks, b""]), dtype="<u4").reshape(len(blocks), -1)
    words = np.ascontiguousarray(rows.T)
    a = np.full(len(blocks), (_START + length) & _MASK, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    last = len(words) - 3
    _mix_columns(a, b, c, words[:last])
    found: list[int] = _final(a + words[last], b + words[last + 1], c + words[last + 2]).tolist()
    return found


def _mix_columns(a: Words, b: Words, c: Words, words: Words) -> None:
    """What `_mix` does, for many states at once and in place; uint32 needs no masks."""
    left, right = np.empty_like(a), np.empty_like(a)
    steps = [
        (x, y, z, np.uint32(bits), np.uint32(32 - bits))
        for (x, y, z), bits in zip(2 * [(a, c, b), (b, a, c), (c, b, a)], _ROTATIONS, strict=True)
    ]
    for index in range(0, len(words), 3):
        a += words[index]
        b += words[index + 1]
        c += words[index + 2]
        for x, y, z, bits, others in steps:
            np.subtract(x, y, out=x)
            np.left_shift(y, bits, out=left)
            np.right_shift(y, others, out=right)
            np.bitwise_or(left, right, out=left)
            np.bitwise_xor(x, left, out=x)
            np.add(y, z, out=y)


def _hash(words: tuple[int, ...], start: int) -> int:
    """Hash words of 32 bits, a multiple of three and at least three of them."""
    a = b = c = start
    last = len(words) - 3
    for index in range(0, last, 3):
        a, b, c = _mix(
            a + words[index] & _MASK, b + words[index + 1] & _MASK, c + words[index + 2] & _MASK
        )
    final = a + words[last] & _MASK, b + words[last + 1] & _MASK, c + words[last + 2] & _MASK
    return int(_final(*final))


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    a = (a - c & _MASK) ^ (c << 4 & _MASK | c >> 28)
    c = c + b & _MASK
    b = (b - a & _MASK) ^ (a << 6 & _MASK | a >> 26)
    a = a + c & _MASK
    c = (c - b & _MASK) ^ (b << 8 & _MASK | b >> 24)
    b = b + a & _MASK
    a = (a - c & _MASK) ^ (c << 16 & _MASK | c >> 16)
    c = c + b & _MASK
    b = (b - a & _MASK) ^ (a << 19 & _MASK | a >> 13)
    a = a + c & _MASK
    c = (c - b & _MASK) ^ (b << 4 & _MASK | b >> 28)
    b = b + a & _MASK
    return a, b, c


def _final(a: Any, b: Any, c: Any) -> Any:
    """The last scrambling, of integers or arrays."""
    c = (c ^ b) - (b << 14 & _MASK | b >> 18) & _MASK
    a = (a ^ c) - (c << 11 & _MASK | c >> 21) & _MASK
    b = (b ^ a) - (a << 25 & _MASK | a >> 7) & _MASK
    c = (c ^ b) - (b << 16 & _MASK | b >> 16) & _MASK
    a = (a ^ c) - (c << 4 & _MASK | c >> 28) & _MASK
    b = (b ^ a) - (a << 14 & _MASK | a >> 18) & _MASK
    return (c ^ b) - (b << 24 & _MASK | b >> 8) & _MASK
